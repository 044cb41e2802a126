"""compress and its plans, on files: bytes, errors, what stays dense and why."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.safetensors_file import SafetensorsFile
from tcompress.errors import NumericalError, OutputError, UsageError
from tcompress.formats import FORMATS
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import Plan, Rule, Target, parse_plan, plan_for
from tcompress.workflow.settings import Settings
from tcompress.workflow.verification import verify


def run(model, out, choice, **options):
    rules = {name: options.pop(name) for name in ("include", "exclude", "one_threshold") if name in options}
    return compress(open_checkpoint(model), plan_for(choice, **rules), out=out, **options)


def by_name(result):
    return {row.layer.name: row for row in result.layers}


def test_the_bytes_reported_are_those_of_the_file(model_file, tmp_path):
    result = run(model_file, tmp_path / "out.safetensors", SVD(rank=3))
    assert result.stored_bytes == result.output.nbytes == (tmp_path / "out.safetensors").stat().st_size
    assert result.source.nbytes == model_file.stat().st_size
    assert result.compression_ratio == result.source.nbytes / result.output.nbytes > 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.int8, torch.int4, torch.int3], ids=str)
@pytest.mark.parametrize(
    "choice",
    [SVD(rank=3), Sparse(density=0.2), Sparse(density=0.03), Target(SVD, keep=0.4), Target(Sparse, tolerance=0.3)],
    ids=str,
)
def test_a_dry_run_knows_the_files_to_the_byte(model_file, tmp_path, choice, dtype):
    settings = Settings(store=dtype)
    planned = dry_run(open_checkpoint(model_file), plan_for(choice), settings=settings)
    result = run(model_file, tmp_path / "out.safetensors", choice, settings=settings)
    assert planned.output is None
    assert planned.exact_bytes == (choice != Sparse(density=0.03))
    if planned.exact_bytes:
        assert planned.stored_bytes == result.stored_bytes
        assert [row.stored_bytes for row in planned.layers] == [row.stored_bytes for row in result.layers]
    else:  # how many bytes the gaps take is known when it is known where the values lie
        assert 0.95 * planned.stored_bytes < result.stored_bytes <= planned.stored_bytes


def test_a_dry_run_of_a_weight_with_a_pattern_gives_a_bound(tmp_path):
    weight = torch.randn(64, 24, 4, generator=torch.Generator().manual_seed(0))
    weight[:, :, 1:3] = 0
    save_file({"fc.weight": weight.reshape(64, 96)}, tmp_path / "model.safetensors")
    planned = dry_run(open_checkpoint(tmp_path / "model.safetensors"), plan_for(Sparse(density=1.0)))
    result = run(tmp_path / "model.safetensors", tmp_path / "out.safetensors", Sparse(density=1.0))
    assert not planned.exact_bytes
    assert result.exact_bytes
    assert planned.layers[0].stored_bytes == 64 * 48 * 4 + 768
    assert result.layers[0].stored_bytes == 64 * 48 * 4 + 576


def test_the_codes_that_are_measured_are_those_that_are_written(model_file, tmp_path):
    for store in (torch.int8, torch.int4, torch.int3):
        for choice in (SVD(rank=4), Sparse(density=0.3)):
            out = tmp_path / f"{choice.name}-{store}.safetensors"
            result = run(model_file, out, choice, settings=Settings(store=store))
            decompress(open_checkpoint(out), out=tmp_path / "dense.safetensors", force=True)
            before, after = load_file(model_file), load_file(tmp_path / "dense.safetensors")
            for row in result.layers:
                if row.format is not None:
                    original = before[row.layer.name].double()
                    error = float((original - after[row.layer.name].double()).norm() / original.norm())
                    assert row.relative_error == pytest.approx(error, rel=1e-6)


def test_a_layer_whose_factors_codes_cannot_hold_stays_dense(tmp_path):
    weight = 1e9 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    save_file({"fc.weight": weight}, tmp_path / "model.safetensors")
    how = {"settings": Settings(store=torch.int4)}
    (row,) = run(tmp_path / "model.safetensors", tmp_path / "out.safetensors", Sparse(density=0.5), **how).layers
    assert row.format is None
    reason = "factor matrix cannot be stored: its values are too large for int4's fp16 scales; int8 has float32 scales"
    assert row.reason == f"sparse:density=0.5: {reason}"


def test_a_dry_run_knows_shards_to_the_byte(fixtures, tmp_path):
    checkpoint, plan = open_checkpoint(fixtures / "digits_mlp_sharded"), plan_for(SVD(rank=8))
    planned = dry_run(checkpoint, plan)
    result = compress(checkpoint, plan, out=tmp_path / "out")
    weights = [*(tmp_path / "out").glob("*.safetensors"), tmp_path / "out" / "tcompress.json"]
    weights.append(tmp_path / "out" / "model.tcompress.safetensors.index.json")
    assert planned.stored_bytes == result.stored_bytes == sum(path.stat().st_size for path in weights)


def test_the_same_input_gives_the_same_bytes(model_file, tmp_path):
    for name in ("one", "two"):
        run(model_file, tmp_path / f"{name}.safetensors", Target(SVD, keep=0.4))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_the_error_is_measured_on_what_decompression_gives(model_file, tmp_path):
    for name, choice in (("svd", SVD(rank=2)), ("sparse", Sparse(density=0.1))):
        out, dense = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.dense.safetensors"
        result = run(model_file, out, choice, settings=Settings(store=torch.bfloat16))
        decompress(open_checkpoint(out), out=dense)
        before, after = load_file(model_file), load_file(dense)
        for row in result.layers:
            original = before[row.layer.name].double()
            error = float((original - after[row.layer.name].double()).norm() / original.norm())
            if row.format is None:
                assert torch.equal(before[row.layer.name], after[row.layer.name])
            else:
                assert row.relative_error == pytest.approx(error, rel=1e-5)
                assert row.relative_error >= error * (1 - 1e-9)


def test_untouched_tensors_keep_name_type_and_bytes(model_file, tmp_path):
    run(model_file, tmp_path / "out.safetensors", SVD(rank=2))
    before, after = open_checkpoint(model_file), open_checkpoint(tmp_path / "out.safetensors")
    for name in ("conv.bias", "steps", "empty"):
        assert before[name] == after[name]
        assert before.raw(name) == after.raw(name)


def test_a_layer_is_never_stored_larger_than_dense_and_says_why(model_file, tmp_path):
    result = run(model_file, tmp_path / "out.safetensors", SVD(rank=30))
    row = by_name(result)["fc.weight"]
    assert row.format == SVD(rank=30)
    row = by_name(run(model_file, tmp_path / "big.safetensors", SVD(rank=36)))["fc.weight"]
    assert row.format is None
    assert row.reason.startswith("larger than dense at svd:rank=36: 20736 + ")
    assert row.reason.endswith("; break-even is svd:rank=34")
    assert row.stored_bytes == row.layer.dense_bytes


def test_break_even_counts_the_original_type_and_the_header(model_file, tmp_path):
    """In half a type the same rank saves nothing when factors are stored wide."""
    wide = run(model_file, tmp_path / "wide.safetensors", SVD(rank=20), settings=Settings(store=torch.float32))
    narrow = run(model_file, tmp_path / "narrow.safetensors", SVD(rank=20))
    assert by_name(wide)["half.weight"].format is None
    assert by_name(narrow)["half.weight"].format is not None


def test_keep_is_a_fraction_of_the_bytes(model_file, tmp_path):
    result = run(model_file, tmp_path / "out.safetensors", Target(Sparse, keep=0.3))
    for row in result.layers:
        if row.format is not None:
            assert 0.28 * row.layer.dense_bytes < row.stored_bytes <= 0.3 * row.layer.dense_bytes


def stored():
    """Yield every format, as it is and in half the bits; CP once, whose search takes many seconds."""
    for store in (None, torch.bfloat16):
        for name, format_type in FORMATS.items():
            marks = [pytest.mark.slow] if name == "cp" and store else []
            yield pytest.param(format_type, store, marks=marks, id=f"{name}-{store}")


@pytest.mark.parametrize(("format_type", "store"), list(stored()))
def test_a_tolerance_holds_for_the_stored_error(model_file, tmp_path, format_type, store):
    choice = Target(format_type, tolerance=0.08)
    result = run(model_file, tmp_path / "out.safetensors", choice, settings=Settings(store=store))
    compressed = [row for row in result.layers if row.format is not None]
    assert compressed or format_type.name in {"shuffled", "joint"}  # nothing here is low-rank in a random order
    assert all(row.relative_error <= 0.08 for row in compressed)
    reasons = ("larger than dense", "has nothing to share")
    assert all(any(reason in row.reason for reason in reasons) for row in result.layers if row.format is None)


def test_one_threshold_prunes_all_layers_at_the_same_magnitude(model_file, tmp_path):
    result = run(model_file, tmp_path / "out.safetensors", Sparse(density=0.2), one_threshold=True)
    decompress(open_checkpoint(tmp_path / "out.safetensors"), out=tmp_path / "dense.safetensors")
    before, after = load_file(model_file), load_file(tmp_path / "dense.safetensors")
    names = [row.layer.name for row in result.layers]
    kept = torch.cat([before[name].float().abs().flatten()[(after[name] != 0).flatten()] for name in names])
    dropped = torch.cat([before[name].float().abs().flatten()[(after[name] == 0).flatten()] for name in names])
    assert kept.min() >= dropped.max()
    assert kept.numel() == round(0.2 * (kept.numel() + dropped.numel()))


def test_one_threshold_meets_a_budget_of_bytes_closely(model_file, tmp_path):
    result = run(model_file, tmp_path / "out.safetensors", Target(Sparse, keep=0.25), one_threshold=True)
    dense = sum(row.layer.dense_bytes for row in result.layers)
    stored = sum(row.stored_bytes for row in result.layers)
    assert 0.24 * dense < stored <= 0.25 * dense


def test_a_saved_plan_gives_the_same_file_again(model_file, tmp_path):
    first = run(model_file, tmp_path / "one.safetensors", Target(Sparse, keep=0.25), exclude=["fc.*"])
    plan = parse_plan(json.loads(json.dumps(first.plan)), "plan.json")
    compress(open_checkpoint(model_file), plan, out=tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_a_plan_mixes_formats_per_layer(model_file, tmp_path):
    plan = Plan((Rule("fc.weight", SVD(rank=4)), Rule("conv.*", Sparse(density=0.1)), Rule("embed*", None)))
    result = by_name(compress(open_checkpoint(model_file), plan, out=tmp_path / "out.safetensors"))
    assert result["fc.weight"].format == SVD(rank=4)
    assert result["conv.weight"].format == Sparse(density=0.1)
    assert result["embed_tokens.weight"].reason == "the plan leaves it dense"
    assert result["half.weight"].reason == "no rule of the plan matches"


def test_nan_stops_the_run_before_anything_is_written_unless_it_may_stay(model_file, tmp_path):
    tensors = load_file(model_file)
    tensors["fc.weight"][3, 4] = float("nan")
    save_file(tensors, tmp_path / "nan.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(NumericalError, match=r"nan.safetensors: tensor fc.weight: holds 1 value that is NaN or Inf"):
        run(tmp_path / "nan.safetensors", out, SVD(rank=2))
    assert not out.exists()
    result = run(tmp_path / "nan.safetensors", out, SVD(rank=2), settings=Settings(allow_nonfinite=True))
    assert by_name(result)["fc.weight"].reason == "holds 1 value that is NaN or Inf"
    assert by_name(result)["half.weight"].format == SVD(rank=2)
    assert SafetensorsFile(out).raw("fc.weight") == SafetensorsFile(tmp_path / "nan.safetensors").raw("fc.weight")


def test_factors_that_overflow_their_type_are_not_written(tmp_path):
    save_file({"fc.weight": torch.full((64, 64), 1e30)}, tmp_path / "model.safetensors")
    result = run(
        tmp_path / "model.safetensors", tmp_path / "o.safetensors", SVD(rank=2), settings=Settings(store=torch.float16)
    )
    assert result.layers[0].reason == "svd:rank=2: a factor is not finite as float16"
    assert verify(open_checkpoint(tmp_path / "o.safetensors")).problems == ()


def test_a_name_that_factors_would_take_keeps_the_layer_dense(tmp_path):
    save_file(
        {"a": torch.ones(3), "a.weight": torch.ones(64, 64), "a.weight.left": torch.ones(1)}, tmp_path / "m.safetensors"
    )
    result = run(tmp_path / "m.safetensors", tmp_path / "o.safetensors", SVD(rank=2))
    assert result.layers[0].reason == "tensor a.weight.left has a name that its factors would take"


def test_a_compressed_checkpoint_is_not_compressed_again(model_file, tmp_path):
    run(model_file, tmp_path / "out.safetensors", SVD(rank=2))
    with pytest.raises(UsageError, match="is compressed already; decompress it first"):
        run(tmp_path / "out.safetensors", tmp_path / "again.safetensors", SVD(rank=2))


def test_an_existing_output_stays_unless_forced(model_file, tmp_path):
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already; use --force"):
        run(model_file, out, SVD(rank=2))
    assert out.read_text() == "mine"
    run(model_file, out, SVD(rank=2), force=True)
    assert SafetensorsFile(out)


def test_the_input_is_never_the_output(model_file):
    with pytest.raises(OutputError, match="is the input itself"):
        run(model_file, model_file, SVD(rank=2), force=True)


def test_the_input_is_left_as_it_was(model_file, tmp_path):
    before = model_file.read_bytes()
    run(model_file, tmp_path / "out.safetensors", SVD(rank=2))
    assert model_file.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_floating_type_comes_back_in_its_type(tmp_path, dtype):
    weight = (torch.randn(64, 4).double() @ torch.randn(4, 96).double()).to(dtype)
    save_file({"fc.weight": weight}, tmp_path / "m.safetensors")
    result = run(tmp_path / "m.safetensors", tmp_path / "o.safetensors", SVD(rank=4))
    decompress(open_checkpoint(tmp_path / "o.safetensors"), out=tmp_path / "d.safetensors")
    assert load_file(tmp_path / "d.safetensors")["fc.weight"].dtype == dtype
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert result.layers[0].relative_error < limit


def test_an_all_zero_layer_is_compressed_without_error(tmp_path):
    save_file({"fc.weight": torch.zeros(64, 64)}, tmp_path / "m.safetensors")
    for name, choice in (("sparse", Target(Sparse, tolerance=0.0)), ("svd", SVD(rank=1))):
        out = tmp_path / f"{name}.safetensors"
        assert run(tmp_path / "m.safetensors", out, choice).layers[0].relative_error == 0
        assert verify(open_checkpoint(out), against=open_checkpoint(tmp_path / "m.safetensors")).problems == ()


def test_one_file_does_not_become_shards(model_file, tmp_path):
    with pytest.raises(UsageError, match="is one file and becomes one file"):
        run(model_file, tmp_path / "out.safetensors", SVD(rank=1), max_shard_bytes=1000)


def test_ranks_follow_the_spectrum_of_each_layer(tmp_path):
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 60, 80, generator=random)
    planted = torch.randn(60, 4, generator=random) @ torch.randn(4, 80, generator=random) + 0.1 * noise[0]
    save_file({"planted.weight": planted, "noise.weight": noise[1]}, tmp_path / "m.safetensors")
    out = tmp_path / "s.safetensors"
    rows = by_name(run(tmp_path / "m.safetensors", out, Target(SVD, rank_rule="evbmf")))
    assert rows["planted.weight"].format == SVD(rank=4)
    assert rows["noise.weight"].format is None  # nothing in it can go
    rows = by_name(run(tmp_path / "m.safetensors", out, Target(SVD, rank_rule="energy:0.5"), force=True))
    assert rows["planted.weight"].relative_error ** 2 <= 0.5 < rows["planted.weight"].relative_error ** 2 + 0.5
