"""What a layer's error is worth, on models small enough to know it."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.workflow.assumed import SMOOTH
from tcompress.workflow.calibration import calibrate
from tcompress.workflow.importance import importances
from tcompress.workflow.knowledge import known_of
from tcompress.workflow.moments import metrics_of
from tcompress.workflow.progress import silent
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS

# A table of which the batches look up the first rows alone, twenty times each.
TASK = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(ROWS, 16)
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, ids):
        return self.linear(self.embed(ids))

def model():
    return Model()

def calibration_batches():
    return [torch.arange(64).repeat(20).reshape(64, 20)]
"""


@pytest.fixture
def traced(tmp_path):
    def call(rows):
        (tmp_path / "task.py").write_text(TASK.replace("ROWS", str(rows)))
        task = load_task(str(tmp_path / "task.py"), NEEDS)
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(4096, 16, generator=generator)[:rows].clone()
        weights = {"embed.weight": table, "linear.weight": torch.randn(16, 16, generator=generator)}
        save_file(weights, tmp_path / "model.safetensors")
        return task, open_checkpoint(tmp_path / "model.safetensors")

    return call


def costs(task, checkpoint):
    """Return D / r of each layer: the importance without its number of values."""
    dense = Reconstruction(checkpoint, task, strip_prefix="", device=torch.device("cpu"))
    traced, batches, layers = dense.dense, dense.batches, find_layers(checkpoint)
    metrics = metrics_of(traced, batches, checkpoint)
    found = importances(traced, batches, layers, checkpoint, metrics)
    return {
        layer.name: found[layer.name] ** 2 / metrics[layer.name].counted(checkpoint.read(layer.name))
        for layer in layers
    }


@pytest.mark.parametrize("rows", [64, 4096])
def test_an_error_of_lookups_costs_the_same_however_many_rows_are_never_looked_up(rows, traced):
    found = costs(*traced(rows))
    # The model is linear: what is wrong in the table is as wrong in the output, up to the matrix between them.
    assert found["embed.weight"] == pytest.approx(1.0, rel=0.25)
    assert found["linear.weight"] == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("rows", [64, 4096])
def test_statistics_weigh_tables_and_matrices_by_one_measure(rows, traced):
    task, checkpoint = traced(rows)
    statistics = calibrate(checkpoint, task)
    known = known_of(checkpoint, find_layers(checkpoint), None, statistics, SMOOTH, silent)
    change = {
        layer.name: known.importance[layer.name] ** 2 / known.metric_of(layer).counted(checkpoint.read(layer.name))
        for layer in find_layers(checkpoint)
    }
    # Without the one or without the other the same output is gone.
    assert change["embed.weight"] == pytest.approx(change["linear.weight"], rel=0.25)
    assert math.isfinite(change["embed.weight"])


def test_without_inputs_a_layer_counts_as_the_root_of_its_outputs(traced):
    _, checkpoint = traced(64)
    layers = find_layers(checkpoint)
    known = known_of(checkpoint, layers, None, None, SMOOTH, silent)
    assert known.importance == {layer.name: math.sqrt(layer.shape[0]) for layer in layers}
