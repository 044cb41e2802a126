"""Layers fitted behind the layers that are compressed before them, on models small enough to be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, NumericalError, TaskError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow import packing
from tcompress.workflow.budgeting import make_plan
from tcompress.workflow.calibration import calibrate
from tcompress.workflow.compression import compress
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import plan_for
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS

TASK = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(12, 12, generator=random)
    return [torch.randn(64, 12, generator=random) @ mix for _ in range(4)]
"""


@pytest.fixture
def task(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(TASK)
    return load_task(str(path), NEEDS)


@pytest.fixture
def model(task):
    torch.manual_seed(0)
    return task.model()


@pytest.fixture
def source(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    return path


def outputs(task, tensors):
    model = task.model()
    model.load_state_dict(tensors)
    with torch.no_grad():
        return torch.cat([model(batch) for batch in task.calibration_batches()])


def distance(source, task, tmp_path, setting, *, sequential):
    with open_checkpoint(source) as checkpoint:
        rebuilt = Reconstruction(checkpoint, task) if sequential else None
        out = tmp_path / "small.safetensors"
        result = compress(checkpoint, plan_for(setting), out=out, reconstruction=rebuilt, force=True)
    with open_checkpoint(out) as small:
        decompress(small, out=tmp_path / "dense.safetensors", force=True)
    dense = outputs(task, load_file(source))
    return float((outputs(task, load_file(tmp_path / "dense.safetensors")) - dense).norm() / dense.norm()), result


@pytest.mark.parametrize("setting", [SVD(rank=6), Sparse(density=0.3)], ids=str)
def test_the_output_is_nearer_than_without_the_inputs(source, task, tmp_path, setting):
    alone, _ = distance(source, task, tmp_path, setting, sequential=False)
    behind, result = distance(source, task, tmp_path, setting, sequential=True)
    assert behind < 0.7 * alone
    told = {row.layer.name: row.output_error for row in result.layers if row.format is not None}
    assert all(error is not None for error in told.values())
    assert told["4.weight"] == pytest.approx(behind, rel=0.2)  # the last layer's output is the model's, its bias aside


def test_the_target_is_the_least_squares_solution_from_the_prefix(source, task):
    with open_checkpoint(source) as checkpoint:
        both = Reconstruction(checkpoint, task)
        first, second, _ = find_layers(checkpoint)
        weight = checkpoint.read(second.name)
        changed = checkpoint.read(first.name) * 0.5
        both.install(first, changed)
        aim = both.aim(second, weight)
    tensors = load_file(source)
    x0 = torch.cat(list(task.calibration_batches())) @ tensors["0.weight"].T + tensors["0.bias"]
    x = torch.cat(list(task.calibration_batches())) @ changed.T + tensors["0.bias"]
    x0, x = x0.relu().double(), x.relu().double()
    gram, cross = x.T @ x / len(x), x0.T @ x / len(x)
    damping = 0.01 * gram.diagonal().mean()
    damped = gram + damping * torch.eye(24)
    expected = torch.linalg.solve(damped, (weight.double() @ cross + damping * weight).T).T
    torch.testing.assert_close(aim.metric.gram.double(), damped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(aim.target.double(), expected, rtol=1e-3, atol=1e-4)
    wanted = float(((x0 @ weight.double().T) - (x @ weight.double().T)).norm() / (x0 @ weight.double().T).norm())
    assert aim.output_error(weight) == pytest.approx(wanted, rel=1e-4)


def test_without_any_error_before_it_a_layer_keeps_its_weight(source, task):
    with open_checkpoint(source) as checkpoint:
        both = Reconstruction(checkpoint, task)
        for layer in both.ordered(find_layers(checkpoint)):
            weight = checkpoint.read(layer.name)
            torch.testing.assert_close(both.aim(layer, weight).target, weight, rtol=1e-4, atol=1e-5)


def test_the_same_inputs_give_the_same_bytes(source, task, tmp_path):
    written = []
    for name in ("one", "two"):
        with open_checkpoint(source) as checkpoint:
            out = tmp_path / f"{name}.safetensors"
            compress(checkpoint, plan_for(SVD(rank=4)), out=out, reconstruction=Reconstruction(checkpoint, task))
            written.append(out.read_bytes())
    assert written[0] == written[1]


def test_a_plan_made_with_a_model_keeps_its_budget(source, task, tmp_path):
    with open_checkpoint(source) as checkpoint:
        both = Reconstruction(checkpoint, task)
        planned = make_plan(checkpoint, keep=0.3, formats=[SVD, Sparse], reconstruction=both)
        result = compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors", reconstruction=both)
    assert sum(row.stored_bytes for row in result.layers) <= 0.3 * sum(row.layer.dense_bytes for row in result.layers)
    assert all("output" in each.why for each in planned.layers if each.chosen.format is not None)


def test_inputs_that_are_not_finite_name_the_layer(source, task, tmp_path):
    tensors = load_file(source)
    tensors["0.bias"][0] = float("inf")
    save_file(tensors, tmp_path / "broken.safetensors")
    with open_checkpoint(tmp_path / "broken.safetensors") as checkpoint:
        both = Reconstruction(checkpoint, task)
        with pytest.raises(NumericalError, match=r"tensor 2\.weight: its inputs? (is|are) not finite"):
            make_plan(checkpoint, keep=0.3, formats=[SVD], reconstruction=both)


def test_batches_that_do_not_fit_the_model_are_told_with_their_number(source, tmp_path):
    path = tmp_path / "other.py"
    path.write_text(TASK.replace("for _ in range(4)]", "for _ in range(4)] + [torch.zeros(3, 5)]"))
    with open_checkpoint(source) as checkpoint:
        both = Reconstruction(checkpoint, load_task(str(path), NEEDS))
        with pytest.raises(TaskError, match="batch 5 of calibration_batches does not fit the model"):
            make_plan(checkpoint, keep=0.3, formats=[SVD], reconstruction=both)


class Shared(nn.Module):
    """Two layers that look at one input, and their product."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.query(x) * self.key(x))


def test_layers_come_in_the_order_of_their_calls(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(
        "import torch\nfrom tests.workflow.test_reconstruction import Shared\nmodel = Shared\n"
        "def calibration_batches():\n    return [torch.ones(4, 8)]\n"
    )
    torch.manual_seed(0)
    save_file(Shared().state_dict(), tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        both = Reconstruction(checkpoint, load_task(str(path), NEEDS))
        names = [layer.name for layer in both.ordered(find_layers(checkpoint))]
    assert names == ["query.weight", "key.weight", "last.weight"]


def test_a_plan_from_statistics_is_about_outputs_and_only_of_their_own_checkpoint(source, task, tmp_path):
    with open_checkpoint(source) as checkpoint:
        found = calibrate(checkpoint, task)
        planned = make_plan(checkpoint, keep=0.3, formats=[SVD, Sparse], statistics=found)
    assert all("output" in each.why for each in planned.layers if each.chosen.format is not None)
    changed = {name: tensor + 1 for name, tensor in load_file(source).items()}
    save_file(changed, tmp_path / "other.safetensors")
    with (
        open_checkpoint(tmp_path / "other.safetensors") as other,
        pytest.raises(InputError, match="another checkpoint"),
    ):
        make_plan(other, keep=0.3, statistics=found)


def test_a_stopped_run_goes_on_behind_the_layers_that_were_done(source, task, tmp_path, monkeypatch):
    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    setting = plan_for(Sparse(density=0.3))

    def go(out):
        with open_checkpoint(source) as checkpoint:
            return compress(checkpoint, setting, out=out, reconstruction=Reconstruction(checkpoint, task))

    go(whole)
    original = packing.fit
    calls = []

    def stops_at_the_third(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(packing, "fit", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        go(again)
    result = go(again)
    assert len(calls) == 4  # only the last layer is fitted again
    assert again.read_bytes() == whole.read_bytes()
    assert "went on from 2 finished steps of a run that was stopped" in result.notes


def test_other_inputs_begin_anew(source, task, tmp_path, monkeypatch):
    path = tmp_path / "more.py"
    path.write_text(TASK.replace("range(4)", "range(5)"))
    out, original = tmp_path / "out.safetensors", packing.fit

    def go(chosen):
        with open_checkpoint(source) as checkpoint:
            both = Reconstruction(checkpoint, chosen)
            return compress(checkpoint, plan_for(Sparse(density=0.3)), out=out, reconstruction=both)

    calls = []

    def stops_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(packing, "fit", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        go(task)
    assert (
        "what an unfinished run with other settings had left was thrown away" in go(load_task(str(path), NEEDS)).notes
    )


TIED = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.relu(self.mix(self.table(ids))))

def model():
    return Net()

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, 10, (8, 4), generator=random) for _ in range(3)]
"""


def test_a_table_that_is_a_head_as_well_is_fitted_to_the_head_s_inputs(tmp_path):
    (tmp_path / "tied.py").write_text(TIED)
    task = load_task(str(tmp_path / "tied.py"), NEEDS)
    torch.manual_seed(0)
    model = task.model()
    tensors = {"table.weight": model.table.weight, "mix.weight": model.mix.weight, "mix.bias": model.mix.bias}
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "tied.safetensors")
    with open_checkpoint(tmp_path / "tied.safetensors") as checkpoint:
        both = Reconstruction(checkpoint, task)
        table = next(layer for layer in find_layers(checkpoint) if layer.name == "table.weight")
        weight = checkpoint.read("table.weight")
        aim = both.aim(table, weight)
        with torch.no_grad():
            inputs = torch.cat([torch.relu(model.mix(model.table(batch))).reshape(-1, 6) for batch in both.batches])
    gram = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(aim.target, weight, rtol=1e-3, atol=1e-4)
    off = 0.9 * weight
    assert aim.output_error(off) == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(aim.metric.gram, gram + 0.01 * gram.diagonal().mean() * torch.eye(6))


def test_a_table_is_fitted_to_its_lookups(tmp_path):
    (tmp_path / "tied.py").write_text(TIED.replace("        self.head.weight = self.table.weight\n", ""))
    task = load_task(str(tmp_path / "tied.py"), NEEDS)
    save_file(task.model().state_dict(), tmp_path / "free.safetensors")
    with open_checkpoint(tmp_path / "free.safetensors") as checkpoint:
        both = Reconstruction(checkpoint, task)
        table = next(layer for layer in find_layers(checkpoint) if layer.name == "table.weight")
        weight = checkpoint.read("table.weight")
        aim = both.aim(table, weight)
    counts = torch.bincount(torch.cat([batch.flatten() for batch in both.batches]), minlength=20)
    torch.testing.assert_close(aim.metric.rows, counts.double() + 1)
    unseen = weight.clone()
    unseen[10:] = 0
    assert aim.output_error(unseen) == 0
    assert aim.output_error(weight * 0.5) == pytest.approx(0.5)
