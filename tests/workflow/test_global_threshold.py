"""One threshold over many layers, found streaming, against sorting everything that there is."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import FormatError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.global_threshold import share_threshold
from tcompress.workflow.plan import Rule, Target, plan_for
from tcompress.workflow.verification import verify

SHAPES = {"a.weight": (40, 60), "b.weight": (64, 32), "c.weight": (24, 8, 3, 3), "d.weight": (16, 200)}


@pytest.fixture
def checkpoint(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator) * scale
        for (name, shape), scale in zip(SHAPES.items(), (1.0, 3.0, 0.1, 0.7), strict=True)
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path / "model.safetensors")


def shared_out(checkpoint, choice):
    layers = find_layers(checkpoint)
    stored = {layer.name: torch.float32 for layer in layers}
    return layers, share_threshold(checkpoint, layers, Rule("*", choice, one_threshold=True), stored)


@pytest.mark.parametrize("method", ["residual", "masking", "alternating"])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_the_threshold_is_that_of_all_residuals_together(checkpoint, method, density):
    choice = LowRankSparse(density=density, method=method, rounds=5)
    layers, settings = shared_out(checkpoint, choice)
    rests = {layer.name: choice.unpruned(checkpoint.read(layer.name)).abs().flatten() for layer in layers}
    together = torch.cat(list(rests.values()))
    count = math.floor(density * together.numel() + 0.5)
    threshold = together.sort(descending=True).values[count - 1]
    for layer in layers:
        assert settings[layer.name].kept(layer.values) == int((rests[layer.name] >= threshold).sum())
    assert sum(settings[layer.name].kept(layer.values) for layer in layers) == count
    assert len({settings[layer.name].density for layer in layers}) > 1


def test_ties_at_the_threshold_go_to_the_earlier_layers(tmp_path):
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, tmp_path / "ones.safetensors")
    model = open_checkpoint(tmp_path / "ones.safetensors")
    layers, settings = shared_out(model, Sparse(density=0.5))
    kept = [settings[layer.name].kept(layer.values) for layer in layers]
    values = [layer.values for layer in layers]
    assert sum(kept) == math.floor(sum(values) / 2 + 0.5)
    assert kept == [values[0], values[1], sum(kept) - values[0] - values[1], 0]


def test_one_residual_at_a_time_is_in_memory(checkpoint, monkeypatch):
    alive: list[weakref.ref] = []
    original = LowRankSparse.unpruned

    def counted(self, weight):
        gc.collect()
        assert not [each for each in alive if each() is not None]
        rest = original(self, weight)
        alive.append(weakref.ref(rest))
        return rest

    monkeypatch.setattr(LowRankSparse, "unpruned", counted)
    shared_out(checkpoint, LowRankSparse(density=0.3, method="residual"))
    assert len(alive) == 2 * len(SHAPES)


@pytest.mark.parametrize("keep", [0.6, 0.3, 0.15])
def test_the_budget_is_that_of_all_layers_together(checkpoint, keep, tmp_path):
    plan = plan_for(Target(LowRankSparse, {"method": "residual"}, keep=keep), one_threshold=True)
    planned, out = dry_run(checkpoint, plan), tmp_path / "small.safetensors"
    result = compress(checkpoint, plan, out=out)
    dense = sum(layer.dense_bytes for layer in find_layers(checkpoint))
    stored = sum(row.stored_bytes for row in result.layers)
    assert 0.9 * keep * dense <= stored <= keep * dense
    assert result.stored_bytes <= planned.stored_bytes
    assert verify(open_checkpoint(out), against=checkpoint).problems == ()
    assert len({row.format.density for row in result.layers if row.format is not None}) > 1


def test_groups_of_m_have_no_threshold(checkpoint):
    with pytest.raises(FormatError, match="one threshold for many layers does not make groups of m"):
        shared_out(checkpoint, Sparse(density=0.5, m=4))


def test_a_budget_above_what_there_is_keeps_everything(checkpoint):
    layers = find_layers(checkpoint)
    stored = {layer.name: torch.int8 for layer in layers}
    rule = Rule("*", Target(Sparse, keep=0.9), one_threshold=True)
    settings = share_threshold(checkpoint, layers, rule, stored)
    assert {settings[layer.name].density for layer in layers} == {1.0}
