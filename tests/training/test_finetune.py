"""finetune: scores rise, zeros stay, types and formats too, and what is written is the best."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from safetensors.torch import save_file

from fixtures.models import DigitsMLP, held_out_images
from tcompress import compress, decompress, load_into, make_method, plan_for, verify
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.encodings import INT4
from tcompress.errors import NumericalError
from tcompress.formats.joint import Joint
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.sparse_product import SparseProduct
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.workflow.decoding import view
from tcompress.workflow.settings import Settings
from tests.training.tasks import CNN, MLP, THREE, factors

SETTINGS = [
    (SVD(rank=4), None),
    (SVD(rank=4), torch.int8),
    (TT(rank=4), torch.bfloat16),
    (Sparse(density=0.05), None),
    (Sparse(density=0.05), torch.int8),
    (Sparse(density=0.5, m=4), INT4),
    (Sparse(density=0.95), torch.int8),  # stored without a support
    (LowRankSparse(rank=2, density=0.05), torch.int8),
    (SparseProduct(nonzeros=4), None),
]


@pytest.mark.parametrize(("setting", "store"), SETTINGS, ids=str)
def test_scores_rise_and_what_is_written_keeps_formats_codings_and_zeros(setting, store, small, tune, fixtures):
    path = small(setting, store)
    result = tune(path)
    assert result.after.scores["accuracy"] > result.before.scores["accuracy"]
    assert result.after.scores == max((row.scores for row in result.rows), key=lambda scores: scores["accuracy"])
    assert verify(open_checkpoint(result.output.path)).problems == ()
    dense = open_checkpoint(fixtures / "digits_mlp.safetensors")
    assert verify(open_checkpoint(result.output.path), against=dense).problems == ()
    was, now = (view(open_checkpoint(each)).manifest for each in (path, result.output.path))
    for name, entry in was.layers.items():
        assert now.layers[name].factors == entry.factors
        assert (now.layers[name].format, now.layers[name].options) == (entry.format, entry.options)
    assert now.source == was.source
    before, after = factors(path), factors(result.output.path)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], factor) for name, factor in after.items())
    for key, factor in after.items():
        is_sparse = "sparse" in key[1] or isinstance(setting, Sparse | SparseProduct)
        if is_sparse and (before[key] == 0).any():
            assert not factor[before[key] == 0].any()


def test_the_score_told_is_that_of_the_file(small, tune, fixtures):
    result = tune(small(Sparse(density=0.3), INT4), against=fixtures / "digits_mlp.safetensors")
    model = load_into(DigitsMLP(), result.output.path).eval()
    images, labels = held_out_images()
    assert result.after.scores["accuracy"] == int((model(images).argmax(1) == labels).sum()) / len(labels)
    assert result.dense.scores["accuracy"] == pytest.approx(0.9361, abs=1e-3)
    assert result.after.nbytes == result.output.path.stat().st_size
    assert all(entry.relative_error > 0 for entry in view(open_checkpoint(result.output.path)).manifest.layers.values())


def test_normalisations_biases_and_statistics_learn_and_counters_stay(small, tune, tmp_path, fixtures):
    path = small(SVD(rank=4), source="digits_cnn.safetensors")
    result = tune(path, text=CNN, epochs=1)
    assert result.best_epoch == 1
    before, after = open_checkpoint(path), open_checkpoint(result.output.path)
    for name in ("bn1.running_mean", "bn1.weight", "fc.bias", "conv1.weight"):
        assert not torch.equal(before.read(name), after.read(name)), name
    assert torch.equal(before.read("bn1.num_batches_tracked"), after.read("bn1.num_batches_tracked"))
    dense = tmp_path / "dense.safetensors"
    decompress(after, out=dense)
    original = open_checkpoint(fixtures / "digits_cnn.safetensors")
    assert [(i.name, i.shape, i.dtype) for i in open_checkpoint(dense).values()] == [
        (i.name, i.shape, i.dtype) for i in original.values()
    ]


def test_a_folder_of_bf16_shards_stays_one(small, tune):
    path = small(SVD(rank=4), source="digits_mlp_sharded")
    result = tune(path, out="tuned")
    assert {file.name for file in result.output.path.iterdir()} == {file.name for file in path.iterdir()}
    assert verify(open_checkpoint(result.output.path)).problems == ()


def test_types_of_the_file_are_kept_by_a_float32_model(small, tune):
    path = small(SVD(rank=4), source="digits_mlp_bf16.safetensors")
    result = tune(path)
    was, now = open_checkpoint(path), open_checkpoint(result.output.path)
    assert {name: info.dtype for name, info in was.items()} == {name: info.dtype for name, info in now.items()}


def test_layers_that_are_tied_are_tied_still(small, tune):
    text = MLP.replace("DigitsMLP", "DigitsTiedMLP")
    path = small(SVD(rank=4), source="digits_mlp_tied.pt")
    result = tune(path, text=text)
    assert view(open_checkpoint(result.output.path)).manifest.tied == view(open_checkpoint(path)).manifest.tied


@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
def test_layers_that_share_factors_share_them_still(store, tune, tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_file(
        {f"{n}.weight": torch.randn(24, 24, generator=generator) for n in range(3)}, tmp_path / "three.safetensors"
    )
    path = tmp_path / "small.safetensors"
    plan, dense = plan_for(Joint(rank=4)), open_checkpoint(tmp_path / "three.safetensors")
    compress(dense, plan, out=path, settings=Settings(store=store))
    result = tune(path, text=THREE)
    was, now = (view(open_checkpoint(each)).manifest for each in (path, result.output.path))
    assert was.shared
    assert now.shared == was.shared
    assert result.best_epoch > 0
    assert verify(open_checkpoint(result.output.path), against=dense).problems == ()


def test_an_epoch_that_is_no_better_is_not_written(small, tune):
    path = small(SVD(rank=40))
    result = tune(path, lr=0.3)
    assert result.best_epoch == 0
    assert result.after.scores == result.before.scores
    assert "no epoch was better than the model before: its values are written as they were" in result.notes
    before, after = open_checkpoint(path), open_checkpoint(result.output.path)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before)


@pytest.mark.parametrize("name", ["epochs.csv", "epochs.json"])
def test_the_history_has_a_row_an_epoch(name, small, tune, tmp_path):
    result = tune(small(SVD(rank=4)), history=tmp_path / name, epochs=3)
    text = (tmp_path / name).read_text()
    rows = json.loads(text) if name.endswith("json") else list(csv.DictReader(text.splitlines()))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert [int(row["step"]) for row in rows] == [0, 5, 10, 15]
    last = rows[-1]["scores"] if name.endswith("json") else rows[-1]
    assert float(last["accuracy"]) == result.rows[-1].scores["accuracy"]


def test_steps_end_a_run_in_the_middle_of_an_epoch(small, tune):
    result = tune(small(SVD(rank=4)), epochs=None, steps=8)
    assert [(row.epoch, row.step) for row in result.rows] == [(0, 0), (1, 5), (2, 8)]


def test_patience_and_hours_end_a_run(small, tune):
    assert len(tune(small(SVD(rank=40)), lr=0.3, epochs=9, patience=2).rows) == 3
    assert tune(small(SVD(rank=4)), epochs=9, max_hours=1e-9, force=True).steps == 1


def test_accumulated_batches_are_one_step_and_the_same_as_one_large_batch(small, tune, tmp_path):
    path = small(SVD(rank=4))
    one = tune(path, text=MLP.replace("split(128)", "split(320)"), out="one.safetensors")
    several = tune(path, text=MLP.replace("split(128)", "split(80)"), accumulate=4, out="several.safetensors")
    assert (one.steps, several.steps) == (4, 4)
    first, second = (factors(tmp_path / name) for name in ("one.safetensors", "several.safetensors"))
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)


def test_bf16_trains_parameters_that_stay_float32(small, tune):
    result = tune(small(LowRankSparse(rank=4, density=0.05)), precision="bf16")
    assert result.after.scores["accuracy"] > result.before.scores["accuracy"]
    assert {factor.dtype for factor in factors(result.output.path).values()} == {torch.float32}


def test_the_tasks_optimizer_and_scheduler_are_used(small, tune):
    text = f"""{MLP}
def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.25)

def scheduler(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
"""
    assert [row.lr for row in tune(small(SVD(rank=4)), text=text).rows] == [0.0, 0.25, 0.125]


def test_a_loss_that_is_nan_ends_a_run_with_the_best_before(small, tune, tmp_path):
    text = MLP + "\ncalls = 0\nplain = loss\n"
    text += "def loss(model, batch):\n    global calls\n    calls += 1\n"
    text += "    return plain(model, batch) * (float('nan') if calls == 8 else 1)\n"
    result = tune(small(SVD(rank=4)), text=text)
    assert result.problem == "step 8: the loss is NaN; a smaller --lr may keep it finite"
    assert (result.best_epoch, result.after.scores) == (1, result.rows[1].scores)
    with pytest.raises(NumericalError, match=r"step 8: the loss is infinite; .* nothing was written"):
        tune(small(SVD(rank=4)), text=text.replace("'nan'", "'inf'"), out="other.safetensors", steps=9, lr=1e-30)
    assert not (tmp_path / "other.safetensors").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_defaults_of_a_method_are_enough(small, tune):
    result = tune(small(SVD(rank=4)), make_method("finetune"), epochs=None)
    assert len(result.rows) == 1 + make_method("finetune").defaults.epochs
