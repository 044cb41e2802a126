"""prune: the mathematics of algorithm 1 against NumPy and by hand, and what is written in the end."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import tcompress as package
from fixtures.models import DigitsMLP, held_out_images
from tcompress import compress, decompress, load_into, make_method, plan_for, verify
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.encodings import INT3, INT4
from tcompress.errors import LimitError, NumericalError, UsageError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.runtime.install import collect
from tcompress.runtime.learning import Pruned
from tcompress.runtime.packed import Packed, stored_in
from tcompress.training.factors import as_stored
from tcompress.training.models import Models
from tcompress.training.objective import Setup
from tcompress.training.pruning import Prune, prune, sparsity
from tcompress.training.tuning import needs_of
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan, Rule, Target
from tcompress.workflow.settings import Settings
from tests.training.tasks import CNN, MLP, factors

ADDITIVE = LowRankSparse(rank=2, density=0.15, method="residual")
MASKING = LowRankSparse(rank=2, density=0.15, method="masking", reconstruction="masking")
TRAIN = LowRankSparse(rank=1, low_rank="tt", density=0.15)
WRITTEN = [(Sparse(density=0.15), torch.int8), (ADDITIVE, INT4), (MASKING, torch.bfloat16), (TRAIN, None)]
SETTINGS = [
    *WRITTEN,
    (ADDITIVE, None),
    (MASKING, torch.int8),
    (LowRankSparse(rank=0, density=0.15, reconstruction="masking"), None),
    (Sparse(density=1.0), torch.int8),
    (Sparse(density=1.0), torch.bfloat16),
]


@pytest.fixture
def pruned(from_dense):
    return from_dense(Prune, epochs=3, out="p.safetensors")


@pytest.fixture
def prepared(small, fixtures, tmp_path):
    """Return the model that learns as the method has made it, and the dense one."""

    def call(setting, store=None, method=None, source="digits_mlp.safetensors", text=MLP):
        (tmp_path / "task.py").write_text(text)
        task = package.load_task(str(tmp_path / "task.py"), needs_of(Prune()))
        start = open_checkpoint(small(setting, store, source=source))
        models = Models(start, task, "", torch.device("cpu"))
        dense = models.dense(open_checkpoint(fixtures / source))
        model, _ = models.learning()
        (method or Prune()).prepare(Setup(task, model, dense, epochs=None, seed=0), dense)
        return model, dense

    return call


def parts_of(model):
    return [module for module in model.modules() if isinstance(module, Pruned)]


def part(values):
    values = torch.as_tensor(values)
    return Pruned(values, torch.float32, None, planned=0)


def test_the_schedules_are_those_of_the_papers():
    # Equation 7 with n = 4, s_f = 0.9: 0.9 / 64, 0.9 / 8, 0.9 * 27 / 64, 0.9.
    assert [sparsity(t / 4, 0.9, "cubic") for t in range(5)] == pytest.approx([0, 0.0140625, 0.1125, 0.3796875, 0.9])
    # Zhu & Gupta, equation 1, with s_i = 0: s_f - s_f (1 - t/n)^3.
    by_hand = [0, 0.5203125, 0.7875, 0.8859375, 0.9]
    assert [sparsity(t / 4, 0.9, "zhu-gupta") for t in range(5)] == pytest.approx(by_hand)
    for schedule in ("cubic", "zhu-gupta"):
        assert sparsity(1.0, 0.3, schedule) == 0.3
        assert sparsity(1.5, 0.3, schedule) == 0.3


def test_one_threshold_is_numpys_partition_over_all_parts():
    generator = torch.Generator().manual_seed(0)
    parts = [part(scale * torch.randn(size, generator=generator)) for scale, size in ((1, (30, 7)), (0.2, (9, 11)))]
    everything = np.abs(np.concatenate([each.values.detach().numpy().ravel() for each in parts]))
    for count in (250, 100, 99, 1, 0):
        prune(parts, count)
        threshold = np.partition(everything, -count)[-count] if count else math.inf
        for each in parts:
            expected = each.values.detach().numpy()
            np.testing.assert_array_equal(each().detach().numpy(), np.where(abs(expected) >= threshold, expected, 0))
        assert sum(each.kept for each in parts) == count


def test_of_equal_magnitudes_the_first_stay():
    parts = [part([[1.0, -2.0], [2.0, 2.0]]), part([[-2.0, 3.0]])]
    prune(parts, 3)
    assert [each.mask.tolist() for each in parts] == [[[False, True], [True, False]], [[False, True]]]


def test_what_is_pruned_stays_so_though_its_value_grows():
    one = part([[1.0, 2.0, 3.0, 4.0]])
    prune([one], 3)
    one.values.data[0, 0] = 9.0
    assert one().tolist() == [[0.0, 2.0, 3.0, 4.0]]
    prune([one], 3)
    assert one.mask.tolist() == [[False, True, True, True]]
    one.values.data[0, 0] = 3.0
    one.values.data[0, 3] = 3.0
    prune([one], 1)
    assert one.mask.tolist() == [[False, False, True, False]]


def test_what_is_pruned_has_no_gradient_and_is_no_negative_zero():
    one = part([[-1.0, 2.0]])
    prune([one], 1)
    one().sum().backward()
    assert one.values.grad.tolist() == [[0.0, 1.0]]
    assert not torch.signbit(one()).any()


def test_values_that_are_not_finite_are_not_ordered():
    with pytest.raises(NumericalError, match="a sparse value is not finite; a smaller --lr may keep it so"):
        prune([part([[1.0, float("nan")]])], 1)


@pytest.mark.parametrize(("setting", "store"), SETTINGS, ids=str)
def test_the_model_begins_as_the_dense_one(setting, store, prepared):
    model, dense = prepared(setting, store)
    for name, layer in collect(model).items():
        torch.testing.assert_close(layer.weight, dense.get_parameter(name), rtol=0, atol=2e-6)
    images, _ = held_out_images()
    torch.testing.assert_close(model.eval()(images), dense(images), rtol=1e-4, atol=1e-4)


def test_the_parts_are_those_of_the_equations(prepared, small, fixtures):
    weights = {name: open_checkpoint(fixtures / "digits_mlp.safetensors").read(name) for name in ("hidden.weight",)}
    for setting in (ADDITIVE, MASKING):
        model, _ = prepared(setting)
        low = dict(factors(small(setting)))
        left, right = (low["hidden.weight", f"low_rank.{each}"] for each in ("left", "right"))
        layer, weight = collect(model)["hidden.weight"], weights["hidden.weight"]
        expected = weight - left @ right if setting is ADDITIVE else weight
        torch.testing.assert_close(layer.factors.sparse.matrix(), expected)
        prune([layer.factors.sparse.matrix], 50)
        mask = layer.factors.sparse.matrix.mask
        both = left @ right + mask * expected if setting is ADDITIVE else torch.where(mask, weight, left @ right)
        torch.testing.assert_close(layer.weight, both)  # equations 9 and 10


def test_a_zero_that_stands_in_the_place_of_the_low_rank_part_is_one(prepared):
    model, dense = prepared(MASKING)
    dense.hidden.weight.data[0, :5] = 0
    Prune().prepare(Setup(None, model, dense, epochs=None, seed=0), dense)
    layer = collect(model)["hidden.weight"]
    assert layer.factors.sparse.matrix().all()
    torch.testing.assert_close(layer.weight[0, :5], torch.zeros(5), rtol=0, atol=1e-37)


@pytest.mark.parametrize("schedule", ["cubic", "zhu-gupta"])
def test_each_epoch_has_the_count_of_its_schedule_and_masks_only_lose(schedule, prepared, tmp_path):
    method = Prune(schedule=schedule, until=0.75)
    model, dense = prepared(ADDITIVE, method=method)
    task = package.load_task(str(tmp_path / "task.py"), needs_of(Prune()))
    objective = method.objective(Setup(task, model, dense, epochs=4, seed=0))
    parts = parts_of(model)
    values = sum(each.mask.numel() for each in parts)
    final = sum(ADDITIVE.kept(each.mask.numel()) for each in parts)
    before = [each.mask.clone() for each in parts]
    for epoch in (1, 2, 3, 4):
        objective.begin_epoch(epoch, anew=True)
        passed = min(1, epoch / 3)
        part = passed**3 if schedule == "cubic" else 1 - (1 - passed) ** 3
        assert sum(each.kept for each in parts) == values - round((values - final) * part)
        assert all((each.mask <= was).all() for each, was in zip(parts, before, strict=True))
        before = [each.mask.clone() for each in parts]
        for each in parts:
            each.values.data += torch.randn(each.shape) * each.values.std()
        assert objective.may_be_written(epoch) == (epoch >= 3)
    assert not objective.may_be_written(0)
    assert sum(each.kept for each in parts) == final


def test_an_epoch_that_goes_on_prunes_nothing(prepared, tmp_path):
    model, dense = prepared(ADDITIVE)
    task = package.load_task(str(tmp_path / "task.py"), needs_of(Prune()))
    Prune().objective(Setup(task, model, dense, epochs=1, seed=0)).begin_epoch(1, anew=False)
    assert all(each.mask.all() for each in parts_of(model))


@pytest.mark.parametrize("setting", [Sparse(density=0.15), ADDITIVE, MASKING], ids=str)
def test_from_the_last_pruning_on_what_learns_is_what_would_be_stored(setting, prepared, tmp_path):
    model, dense = prepared(setting, INT3)
    task = package.load_task(str(tmp_path / "task.py"), needs_of(Prune()))
    objective = Prune().objective(Setup(task, model, dense, epochs=4, seed=0))
    distances = []
    for epoch in (1, 2, 3):
        objective.begin_epoch(epoch, anew=True)
        learning = [layer.weight.detach().clone() for layer in collect(model).values()]
        with as_stored(model):
            stored = [layer.weight.detach().clone() for layer in collect(model).values()]
        distances.append(max(float((a - b).norm() / b.norm()) for a, b in zip(learning, stored, strict=True)))
    assert distances[0] > 0.05
    assert distances[1:] == pytest.approx([0, 0], abs=1e-4)


def test_the_settings_say_the_density_while_factors_are_as_stored_and_not_longer(prepared):
    model, _ = prepared(ADDITIVE)
    prune(parts_of(model), 100)
    with as_stored(model):
        found = {name: layer.setting.density * math.prod(layer.factors.shape) for name, layer in collect(model).items()}
    assert sum(found.values()) == pytest.approx(100)
    assert {layer.setting.density for layer in collect(model).values()} == {0.15}


def test_a_part_of_which_the_plan_keeps_all_is_stored_sparse_where_pruning_took_most(prepared):
    model, _ = prepared(Sparse(density=1.0), torch.bfloat16)
    prune(parts_of(model), 100)
    with as_stored(model):
        held = [held for layer in collect(model).values() for held in stored_in(layer.factors).values()]
        assert all(isinstance(each, Packed) and each.coding.support.part_names for each in held)


@pytest.mark.parametrize(("setting", "store"), WRITTEN, ids=str)
def test_what_is_written_has_the_plans_values_and_is_what_it_says(setting, store, pruned, small, tmp_path, fixtures):
    dense = open_checkpoint(fixtures / "digits_mlp.safetensors")
    result = pruned(setting, store=store, lr=5e-3)
    written, planned = open_checkpoint(result.output.path), open_checkpoint(small(setting, store))
    assert verify(written, against=dense).problems == ()
    found, expected = factors(result.output.path), factors(planned.path)
    names = [key for key in found if key[1].endswith("matrix")]
    manifest = view(written).manifest
    sizes = {key: found[key].numel() for key in names}
    counts = {key: int((found[key] != 0).sum()) for key in names}
    said = {key: manifest.layers[key[0]].options["density"] * sizes[key] for key in names}
    total = sum(setting.kept(size) for size in sizes.values())
    assert sum(said.values()) == pytest.approx(total)
    for key in names:
        assert counts[key] == round(said[key]) or (store is not None and counts[key] < said[key])  # codes may be 0
    assert len({round(said[key] / sizes[key], 3) for key in names}) > 1, "the threshold is one over all layers"
    assert found.keys() == expected.keys()
    assert result.best_epoch >= 2
    assert result.after.scores["accuracy"] > result.before.scores["accuracy"]
    decompress(written, out=tmp_path / "d.safetensors")
    model = load_into(DigitsMLP(), result.output.path).eval()
    images, labels = held_out_images()
    assert result.after.scores["accuracy"] == int((model(images).argmax(1) == labels).sum()) / len(labels)


def test_layers_in_other_formats_learn_and_frozen_ones_stay(pruned, small):
    plan = Plan((Rule("hidden.*", SVD(rank=4)), Rule("*", Sparse(density=0.1))))
    text = MLP.replace(
        "return DigitsMLP()", "made = DigitsMLP()\n    made.output.requires_grad_(False)\n    return made"
    )
    result = pruned(plan, text=text)
    before, after = factors(small(None, plan=plan)), factors(result.output.path)
    assert {key[0] for key in after if not torch.equal(before[key], after[key])} == {"input.weight", "hidden.weight"}
    assert before.keys() == after.keys()


def test_layers_that_are_tied_are_pruned_as_one(pruned):
    text = MLP.replace("DigitsMLP", "DigitsTiedMLP")
    result = pruned(LowRankSparse(rank=2, density=0.2), text=text, source="digits_mlp_tied.pt")
    manifest = view(open_checkpoint(result.output.path)).manifest
    assert manifest.tied == {"hidden2.weight": "hidden1.weight", "hidden2.bias": "hidden1.bias"}
    kept = [math.prod(entry.shape) * entry.options["density"] for entry in manifest.layers.values()]
    assert sum(kept) == pytest.approx(sum(round(0.2 * math.prod(entry.shape)) for entry in manifest.layers.values()))


def test_convolutions_are_pruned_as_their_matrices(pruned, fixtures):
    result = pruned(LowRankSparse(rank=1, density=0.2), source="digits_cnn.safetensors", text=CNN, epochs=2)
    dense = open_checkpoint(fixtures / "digits_cnn.safetensors")
    assert verify(open_checkpoint(result.output.path), against=dense).problems == ()


@pytest.mark.parametrize("store", [torch.int8, INT3], ids=str)
def test_a_stopped_run_goes_on_to_the_same_bytes(store, pruned, monkeypatch):
    setting = LowRankSparse(rank=1, density=0.2)
    options = {"source": "digits_cnn.safetensors", "text": CNN, "store": store, "epochs": 3}
    method = Prune(until=0.5)  # the second epoch of five steps is the first that learns through codes
    whole = pruned(setting, method, out="whole.safetensors", **options).output
    monkeypatch.setenv("DIE_HOW", "interrupt")
    for die_at, save_every in ((4, 1e-9), (8, 10.0), (8, 1e-9), (13, 1e-9)):
        monkeypatch.setenv("DIE_AT", str(die_at))
        with pytest.raises(KeyboardInterrupt):
            pruned(setting, method, save_every=save_every, **options)
        monkeypatch.setenv("DIE_AT", "0")
        result = pruned(setting, method, save_every=save_every, **options)
        assert result.output.sha256 == whole.sha256
        result.output.path.unlink()


def test_a_run_that_ends_before_the_last_pruning_writes_nothing(pruned, tmp_path):
    with pytest.raises(LimitError, match="ended at step 1, before the method had made what may be written"):
        pruned(ADDITIVE, steps=1)
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (SVD(rank=4), "--method prune has nothing to prune: no layer of the plan is in sparse or low-rank-sparse"),
        (Sparse(density=0.5, m=4), "--method prune has one threshold for all layers, which makes no groups of m"),
        (Plan((Rule("*", Target(Sparse, {"m": 4}, keep=0.3)),)), "one threshold for all layers, which makes no"),
        (Plan((Rule("input.weight", None), Rule("*", None))), "has nothing to prune"),
    ],
)
def test_a_plan_that_does_not_serve_is_one_line_before_anything_begins(plan, says, pruned, tmp_path):
    with pytest.raises(UsageError, match=says):
        pruned(plan)
    assert {each.name for each in tmp_path.iterdir()} <= {"task.py", "__pycache__"}


def test_a_model_in_which_nothing_to_prune_learns_is_one_line(pruned):
    plan = Plan((Rule("input.weight", SVD(rank=4)), Rule("hidden.weight", Sparse(density=0.1))))
    text = MLP.replace(
        "return DigitsMLP()", "made = DigitsMLP()\n    made.hidden.requires_grad_(False)\n    return made"
    )
    with pytest.raises(UsageError, match="nothing to prune: no layer that learns is in sparse or low-rank-sparse"):
        pruned(plan, text=text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prune:schedule=linear", "--method prune: schedule is one of cubic, zhu-gupta, got 'linear'"),
        ("prune:until=0", "--method prune: until is a fraction of the epochs, above 0, to 1; got 0"),
        ("prune:until=nan", "until is "),
        ("prune:alpha=2", "--alpha must be from 0 to 1"),
    ],
)
def test_senseless_options_are_refused(text, says):
    with pytest.raises(UsageError, match=says):
        make_method(text)


def test_it_is_a_command(tcompress, fixtures, tmp_path):
    (tmp_path / "task.py").write_text(MLP)
    words = ["finetune", fixtures / "digits_mlp.safetensors", "--task", "task.py", "--method", "prune:until=0.5"]
    how = ["--format", "lrs:rank=2", "--keep", "0.2", "--dtype", "int8", "--alpha", "0.5", "--epochs", "2"]
    done = tcompress(*words, *how, "-o", "p.safetensors", "--device", "cpu")
    assert (done.code, done.err) == (0, "")
    assert tcompress("verify", "p.safetensors", "--against", fixtures / "digits_mlp.safetensors").code == 0
    compress(
        open_checkpoint(fixtures / "digits_mlp.safetensors"),
        plan_for(Target(LowRankSparse, {"rank": 2}, keep=0.2)),
        out=tmp_path / "one.safetensors",
        settings=Settings(store=torch.int8),
    )
    assert (tmp_path / "p.safetensors").stat().st_size <= 1.05 * (tmp_path / "one.safetensors").stat().st_size
