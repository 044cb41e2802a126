"""Repairs of biases and normalisations: found on some inputs, kept where others agree, and told in the file."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tcompress.checkpoint.journal import Journal
from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.manifest import read_manifest
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats.joint import Joint
from tcompress.formats.sparse import Sparse
from tcompress.report.documents import compression_document, inspection_document, verification_document
from tcompress.report.tables import compression_summary
from tcompress.workflow import compression
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decompression import decompress
from tcompress.workflow.inspection import inspect
from tcompress.workflow.plan import Plan, Rule, plan_for
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.repair_sites import find_sites, least_squares
from tcompress.workflow.repairs import _apart, may_change, repairs
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS
from tcompress.workflow.verification import verify

TASK = """
import torch
from torch import nn

def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.ReLU(),
        nn.Linear(16, 32),
    )

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 6, 6, generator=random) + 0.5 for _ in range(8)]
"""
HEAD = TASK.split("def model", maxsplit=1)[0]
STATISTICS = ("1.running_mean", "1.running_var")


def task_of(tmp_path, text=TASK):
    (tmp_path / "task.py").write_text(text)
    return load_task(str(tmp_path / "task.py"), NEEDS)


def batches_of(task):
    return list(task.calibration_batches())


@pytest.fixture
def task(tmp_path):
    return task_of(tmp_path)


@pytest.fixture
def source(task, tmp_path):
    torch.manual_seed(0)
    model = task.model()
    model[1].momentum = None  # so that one run leaves the statistics that long training would
    with torch.no_grad():
        model(torch.cat(batches_of(task)))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def compressed(source, task, out, setting=None, **options):
    with open_checkpoint(source) as checkpoint:
        models = Reconstruction(checkpoint, task, **options)
        return compress(checkpoint, plan_for(setting or Sparse(density=0.1)), out=out, reconstruction=models)


def repaired_by_hand(source, task, tmp_path, damage):
    """Repair a compressed model whose layers ``damage`` makes of the dense ones."""
    with open_checkpoint(source) as checkpoint, Journal(tmp_path, {}) as journal:
        models = Reconstruction(checkpoint, task)
        for layer in find_layers(checkpoint):
            models.install(layer, damage(layer.name, checkpoint.read(layer.name)))
        pieces, told = repairs(checkpoint, models, journal)
        return {
            name: torch.frombuffer(bytearray(piece.data()), dtype=torch.float32) for name, piece in pieces.items()
        }, told


def test_statistics_of_a_layer_that_became_smaller_are_measured_anew(source, task, tmp_path):
    found, told = repaired_by_hand(
        source, task, tmp_path, lambda name, weight: weight * 0.5 if name == "0.weight" else weight
    )
    assert set(STATISTICS) <= set(found)
    was = load_file(source)
    batches = batches_of(task)
    inputs = torch.cat(batches[:3] + batches[4:7])
    values = nn.functional.conv2d(inputs, 0.5 * was["0.weight"]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["1.running_mean"], values.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["1.running_var"], values.var(1, unbiased=False), rtol=1e-4, atol=1e-5)
    assert told.after < 0.3 * told.before
    assert told.held_out == 64
    assert told.modules == 3


def test_a_shift_that_layers_lost_goes_into_the_bias(source, task, tmp_path):
    constant = torch.arange(16.0)[:, None]

    def lose(name, weight):
        return weight - constant / 512 if name == "4.weight" else weight

    found, told = repaired_by_hand(source, task, tmp_path, lose)
    assert "4.bias" in found
    assert bool((found["4.bias"] > load_file(source)["4.bias"])[1:].all())
    assert told.after < 0.8 * told.before


def test_a_repair_that_other_inputs_contradict_is_taken_back(tmp_path):
    # Every fourth batch is held out, and on it the shift has the other sign.
    text = TASK.replace("+ 0.5 for _ in range(8)", "+ (3.0 if at % 4 == 3 else -3.0) for at in range(8)")
    only_linear = """
def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
"""
    task = task_of(tmp_path, text + only_linear)
    save_file(task.model().state_dict(), tmp_path / "linear.safetensors")
    found, told = repaired_by_hand(tmp_path / "linear.safetensors", task, tmp_path, lambda _, weight: weight * 0.7)
    assert found == {}
    assert told.before == told.after > 0


def test_least_squares_are_those_of_the_outputs(source, task):
    with open_checkpoint(source) as checkpoint:
        models = Reconstruction(checkpoint, task)
        first = find_layers(checkpoint)[0]
        torch.manual_seed(3)
        damaged = checkpoint.read(first.name) + 0.1 * torch.randn(first.shape)
        models.install(first, damaged)
        site = find_sites(checkpoint, models)[0]
        values = least_squares(site, models, models.batches)
    inputs = torch.cat(models.batches)
    outputs = [model.model[:2](inputs).transpose(0, 1).flatten(1).double() for model in (models.prefix, models.dense)]
    site.put(values)
    repaired = models.prefix.model[:2](inputs).transpose(0, 1).flatten(1).double()
    for y, y0, now in zip(*outputs, repaired, strict=True):
        line = torch.stack([y, torch.ones_like(y)], dim=1)
        best = line @ torch.linalg.lstsq(line, y0[:, None]).solution
        torch.testing.assert_close(now, best[:, 0], rtol=1e-4, atol=1e-4)


def test_the_file_says_what_was_repaired_and_verify_believes_it(source, task, tmp_path):
    out = tmp_path / "small.safetensors"
    result = compressed(source, task, out)
    names = result.repairs.names
    assert names, "a tenth of the values leaves something to repair"
    assert result.repairs.after < result.repairs.before
    with open_checkpoint(out) as small, open_checkpoint(source) as dense:
        assert read_manifest(small).repaired == tuple(sorted(names))
        checked = verify(small, against=dense)
        assert inspection_document(inspect(small))["manifest"]["repaired"] == sorted(names)
        decompress(small, out=tmp_path / "dense.safetensors")
    assert checked.problems == ()
    assert verification_document(checked)["repaired"] == sorted(names)
    was, now = load_file(source), load_file(tmp_path / "dense.safetensors")
    layers = {"0.weight", "4.weight", "6.weight"}
    assert {name for name in was if not torch.equal(was[name], now[name])} == layers | set(names)
    assert all(now[name].dtype == was[name].dtype for name in was)


def test_the_distance_that_is_told_is_that_of_the_file(source, task, tmp_path):
    told = compressed(source, task, tmp_path / "small.safetensors").repairs
    with open_checkpoint(tmp_path / "small.safetensors") as small:
        decompress(small, out=tmp_path / "dense.safetensors")
    batches = batches_of(task)
    inputs, outputs = torch.cat([batches[3], batches[7]]), []
    for path in (source, tmp_path / "dense.safetensors"):
        model = task.model().eval()
        model.load_state_dict(load_file(path))
        outputs.append(model(inputs).detach())
    distance = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    assert told.after == pytest.approx(distance, rel=1e-4)


def test_without_repairs_every_other_tensor_stays(source, task, tmp_path):
    result = compressed(source, task, tmp_path / "small.safetensors", repair=False)
    assert result.repairs is None
    assert compression_document(result, [])["repairs"] is None
    with open_checkpoint(tmp_path / "small.safetensors") as small, open_checkpoint(source) as dense:
        assert read_manifest(small).repaired == ()
        assert all(small.raw(name) == dense.raw(name) for name in dense if name in small)


def test_a_run_that_is_stopped_after_its_repairs_writes_the_same_bytes(source, task, tmp_path, monkeypatch):
    compressed(source, task, tmp_path / "whole.safetensors")
    original = compression.repairs

    def stops(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    out = tmp_path / "again.safetensors"
    monkeypatch.setattr(compression, "repairs", stops)
    with pytest.raises(KeyboardInterrupt):
        compressed(source, task, out)
    monkeypatch.setattr(compression, "repairs", original)
    result = compressed(source, task, out)
    assert "went on from 4 finished steps of a run that was stopped" in result.notes
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_run_that_is_stopped_before_its_repairs_finds_the_same(source, task, tmp_path, monkeypatch):
    compressed(source, task, tmp_path / "whole.safetensors")
    out = tmp_path / "again.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(compression, "repairs", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compressed(source, task, out)
    compressed(source, task, out)
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_what_is_planned_is_no_less_than_what_is_written(source, task, tmp_path):
    result = compressed(source, task, tmp_path / "small.safetensors")
    with open_checkpoint(source) as checkpoint:
        models = Reconstruction(checkpoint, task)
        planned = dry_run(checkpoint, plan_for(Sparse(density=0.1)), reconstruction=models)
        plain = dry_run(checkpoint, plan_for(Sparse(density=0.1)))
        may = may_change(checkpoint, models)
    assert not planned.exact_bytes
    assert result.stored_bytes <= planned.stored_bytes
    assert planned.stored_bytes - plain.stored_bytes <= len(json.dumps(json.dumps({"repaired": may}))) + 8


def test_names_in_the_file_have_their_prefix(source, task, tmp_path):
    save_file({f"module.{name}": tensor for name, tensor in load_file(source).items()}, tmp_path / "prefix.safetensors")
    plain = compressed(source, task, tmp_path / "one.safetensors").repairs.names
    other = compressed(
        tmp_path / "prefix.safetensors", task, tmp_path / "two.safetensors", strip_prefix="module."
    ).repairs.names
    assert other == tuple(f"module.{name}" for name in plain)


def test_tensors_of_half_the_width_stay_so(source, task, tmp_path):
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(source).items()
    }
    save_file(halves, tmp_path / "half.safetensors")
    names = compressed(tmp_path / "half.safetensors", task, tmp_path / "small.safetensors").repairs.names
    small = load_file(tmp_path / "small.safetensors")
    assert names
    assert {small[name].dtype for name in names} == {torch.float16}


def test_layers_of_a_group_are_repaired_as_they_are_stored(tmp_path):
    task = task_of(
        tmp_path,
        HEAD + "def model():\n    return nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 48))\n"
        "def calibration_batches():\n    random = torch.Generator().manual_seed(1)\n"
        "    return [torch.randn(32, 48, generator=random) + 1 for _ in range(8)]\n",
    )
    torch.manual_seed(0)
    save_file(task.model().state_dict(), tmp_path / "pair.safetensors")
    plan = Plan((Rule("*", Joint(ranks=(2, 8, 8)), together="all"),))
    with open_checkpoint(tmp_path / "pair.safetensors") as checkpoint:
        models = Reconstruction(checkpoint, task)
        result = compress(checkpoint, plan, out=tmp_path / "small.safetensors", reconstruction=models)
        with open_checkpoint(tmp_path / "small.safetensors") as small:
            decompress(small, out=tmp_path / "dense.safetensors")
    assert all(row.format is not None for row in result.layers)
    now = load_file(tmp_path / "dense.safetensors")
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(models.prefix.model.get_parameter(name), now[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("batches", "seen", "held_out"),
    [
        ([torch.zeros(300, 2)], 225, 75),
        ([(torch.zeros(8, 2), torch.zeros(8))], 6, 2),
        ([{"x": torch.zeros(4, 2), "scale": 2.0}], 3, 1),
        ([torch.zeros(3, 2)], 0, 0),
        ([(torch.zeros(8, 2), torch.zeros(4))], 0, 0),
        ([torch.zeros(5, 2)] * 2, 5, 5),
        ([torch.zeros(5, 2)] * 9, 35, 10),
        ([torch.zeros(100, 2)] * 40, 300, 300),
    ],
)
def test_one_in_four_inputs_is_held_out(batches, seen, held_out):
    def count(found):
        tensors = [
            b if isinstance(b, torch.Tensor) else next(iter(b.values() if isinstance(b, dict) else b)) for b in found
        ]
        return sum(map(len, tensors))

    assert tuple(map(count, _apart(batches))) == (seen, held_out)


def test_tied_and_reused_modules_are_left_alone(tmp_path):
    text = HEAD + (
        "class Twice(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.one = nn.Linear(4, 4)\n"
        "        self.two = nn.Linear(4, 4)\n        self.two.bias = self.one.bias\n"
        "        self.three = nn.Linear(4, 4)\n"
        "        self.last = nn.Linear(4, 4)\n        self.idle = nn.Linear(4, 4)\n"
        "    def forward(self, x):\n        return self.last(self.three(self.three(self.two(self.one(x)))))\n"
        "model = Twice\ndef calibration_batches():\n    return [torch.ones(4, 4)]\n"
    )
    task = task_of(tmp_path, text)
    tensors = {name: tensor.clone() for name, tensor in task.model().state_dict().items()}
    save_file(tensors, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        sites = find_sites(checkpoint, Reconstruction(checkpoint, task))
    assert [dict(site.names) for site in sites] == [{"bias": "last.bias"}]


def test_what_was_repaired_is_told_on_a_line(source, task, tmp_path):
    document = compression_document(compressed(source, task, tmp_path / "small.safetensors"), [])
    (told,) = [line for line in compression_summary(document) if line.startswith("repaired")]
    after, before = (document["repairs"][key] for key in ("distance_after", "distance_before"))
    assert told.endswith(f"on 64 held-out inputs the output is {after:.4g} off, was {before:.4g}")
    document["repairs"] |= {"tensors": []}
    assert any("repaired nothing" in line for line in compression_summary(document))
    document["repairs"] |= {"distance_before": None}
    assert any("nothing was repaired" in line for line in compression_summary(document))


def test_verify_finds_a_repair_that_is_not_there(source, task, tmp_path):
    out = tmp_path / "small.safetensors"
    compressed(source, task, out)
    with open_checkpoint(out) as checkpoint:
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint}
        manifest = json.loads(checkpoint.metadata["tcompress"])
    tensors["4.bias"][0] = math.inf
    manifest["repaired"] = ["4.bias", "1.num_batches_tracked", "5.bias"]
    save_file(tensors, out, metadata={"tcompress": json.dumps(manifest)})
    with open_checkpoint(out) as checkpoint:
        problems = "\n".join(verify(checkpoint).problems)
    assert "tensor 5.bias: is said to be repaired, and is not there" in problems
    assert "tensor 1.num_batches_tracked: is said to be repaired, and is int64" in problems
    assert "tensor 4.bias: is repaired, and has NaN or Inf" in problems


NORMALISED = """
def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16), nn.LayerNorm(16),
        nn.Linear(16, 32),
    )

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(32, 3, 6, 6, generator=random) + 0.5 for _ in range(8)]
"""


@pytest.mark.parametrize(("name", "until", "channels"), [("1.weight", 2, 1), ("5.weight", 6, -1)])
def test_scale_and_bias_of_group_and_layer_normalisations_are_fitted(name, until, channels, tmp_path):
    task = task_of(tmp_path, HEAD + NORMALISED)
    torch.manual_seed(0)
    save_file(task.model().state_dict(), tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        models = Reconstruction(checkpoint, task)
        for layer in find_layers(checkpoint):
            models.install(layer, 0.6 * checkpoint.read(layer.name) + 0.02 * torch.randn(layer.shape))
        site = next(site for site in find_sites(checkpoint, models) if name in site.names.values())

    def outputs(made):
        with torch.no_grad():
            found = made.model[:until](torch.cat(models.batches))
        return found.movedim(channels, -1).flatten(0, -2).double()

    y, y0 = outputs(models.prefix), outputs(models.dense)
    site.put(least_squares(site, models, models.batches))
    repaired = outputs(models.prefix)
    for channel in range(y.shape[1]):
        line = torch.stack([y[:, channel], torch.ones(len(y), dtype=torch.float64)], dim=1)
        best = line @ torch.linalg.lstsq(line, y0[:, channel, None]).solution
        torch.testing.assert_close(repaired[:, channel], best[:, 0], rtol=1e-4, atol=1e-4)
