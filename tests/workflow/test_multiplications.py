"""Multiplications of layers and settings, counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats import FORMATS
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.tucker import Tucker
from tcompress.workflow.budgeting import make_plan
from tcompress.workflow.multiplications import Call, calls_of, multiplications
from tcompress.workflow.rank_multiples import rounded
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS

TASK = """
import torch

def model():
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 8, 3, stride=2, padding=1),
        torch.nn.Conv2d(8, 8, 3, groups=4, padding=1),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 24),
    )

def calibration_batches():
    yield torch.randn(6, 2, 8, 8, generator=torch.Generator().manual_seed(0))
"""
MATRIX = Layer("a.weight", LayerKind.LINEAR, (48, 40), BY_TORCH[torch.float32])
CONV = Layer("b.weight", LayerKind.CONV, (32, 16, 3, 3), BY_TORCH[torch.float32])


@pytest.fixture
def task(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    found = load_task(str(tmp_path / "task.py"), NEEDS)
    save_file(found.model().state_dict(), tmp_path / "model.safetensors")
    return found


def test_calls_are_what_the_model_does(task, tmp_path):
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        models = Reconstruction(checkpoint, task)
        calls = calls_of(models.dense, models.batches[0])
        planned = make_plan(checkpoint, flops=0.6, formats=[SVD], reconstruction=models)
    assert calls == {
        "0.weight": [Call(positions=16, steps=4)],
        "1.weight": [Call(positions=16, groups=4)],
        "3.weight": [Call(positions=1)],
    }
    dense = sum(each.dense_multiplications for each in planned.layers)
    assert dense == 16 * (8 * 2 * 9) + 16 * (8 * 2 * 9) + 24 * 128
    assert sum(each.multiplications for each in planned.layers) <= 0.6 * dense
    assert not planned.notes


@pytest.mark.parametrize(
    ("layer", "setting", "call", "expected"),
    [
        (MATRIX, SVD(5), Call(), 48 * 5 + 5 * 40),
        (MATRIX, TT(ranks=(6, 5, 6)), Call(positions=3), 3 * (48 * 5 + 5 * 40)),
        (CONV, SVD(6), Call(), 32 * 6 + 6 * 144),
        (CONV, SVD(6, matricisation="spatial"), Call(steps=4), 96 * 6 + 4 * 6 * 48),
        (CONV, Tucker(ranks=(9, 8)), Call(steps=4), 32 * 9 + 9 * 8 * 9 + 4 * 8 * 16),
        (CONV, SVD(6), Call(groups=2), 32 * 6 + 2 * 6 * 144),
        (CONV, SVD(32), Call(), CONV.values),
    ],
    ids=str,
)
def test_a_setting_counts_what_its_stages_multiply(layer, setting, call, expected):
    assert multiplications(layer, setting, [call]) == expected


@pytest.mark.parametrize("layer", [MATRIX, CONV], ids=lambda layer: layer.kind)
@pytest.mark.parametrize(
    "kind", [each for each in FORMATS.values() if each.name != "joint"], ids=lambda kind: kind.name
)
def test_every_format_is_counted_and_none_is_above_dense(kind, layer):
    setting = kind.within(layer.shape, torch.float32, layer.dense_bytes // 3)
    assert 0 < multiplications(layer, setting, [Call(3), Call(2)]) <= 5 * layer.values
    assert multiplications(layer, None, [Call(3), Call(2)]) == 5 * layer.values


def test_sparse_parts_count_their_values_in_matrices_alone():
    setting = LowRankSparse(density=0.1, rank=2)
    assert multiplications(MATRIX, Sparse(density=0.25), [Call()]) == 480
    assert multiplications(MATRIX, setting, [Call()]) == 192 + 2 * 88
    assert multiplications(CONV, setting, [Call()]) == CONV.values


def test_an_embedding_multiplies_nothing():
    embedding = Layer("embed.weight", LayerKind.EMBEDDING, (48, 40), BY_TORCH[torch.float32])
    assert multiplications(embedding, None, [Call()]) == multiplications(embedding, SVD(3), [Call()]) == 0


@pytest.mark.parametrize("kind", [SVD, TT, Tucker, LowRankSparse], ids=lambda kind: kind.name)
def test_ranks_become_multiples_or_are_those_of_the_sizes(kind):
    for layer in (MATRIX, CONV):
        for part in (2, 5, 20):
            setting = kind.within(layer.shape, torch.float32, layer.dense_bytes // part)
            found = rounded(setting, 8)
            ranks = getattr(found, "ranks", None) or (found.rank or 8,)
            assert all(rank % 8 == 0 and rank >= 8 for rank in ranks)
            assert found.options().keys() == setting.options().keys()
            shapes = [spec.shape for spec in found.factor_specs(layer.shape, torch.float32).values()]
            assert all(math.prod(shape) for shape in shapes)
    assert rounded(Sparse(0.3), 8) == Sparse(0.3)
    assert rounded(LowRankSparse(density=0.3, rank=0), 8).rank == 0
    assert rounded(SVD(13), 1) == SVD(13)
