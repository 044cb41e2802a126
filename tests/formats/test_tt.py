"""tt against independent truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

from tcompress.formats.tt import TT


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained_like(*shape):
    """A decaying spectrum in every unfolding, smooth kernels, and noise."""
    parts = [tensor_of(size, 12, seed=k) * torch.arange(1, 13) ** -1.5 for k, size in enumerate(shape[:2])]
    kernel = tensor_of(math.prod(shape[2:]), 12, seed=9)
    smooth = torch.einsum("ar,br,kr->abk", *parts, kernel) + 0.02 * tensor_of(*shape[:2], len(kernel), seed=10)
    return smooth.reshape(shape)


def lost(weight, setting):
    return float((setting.fit(weight).reconstruct().detach().double() - weight.double()).norm())


WEIGHTS = {
    "random matrix": tensor_of(96, 128),
    "decaying matrix": trained_like(96, 128),
    "random kernel": tensor_of(64, 64, 3, 3),
    "trained-like kernel": trained_like(64, 64, 3, 3),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("rank", [1, 4, 10, 24])
def test_the_error_is_at_most_tensorlys(weight, rank):
    out, in_, *kernel = weight.shape
    k = math.prod(kernel)
    modes = {"out_modes": (8, out // 8), "in_modes": (in_ // 8, 8)}
    folded = weight.double().numpy().reshape(8, out // 8, in_ // 8, 8, k).transpose(0, 1, 4, 2, 3)
    folded = folded if kernel else folded.squeeze(2)
    setting = TT(rank=rank, **modes)
    ranks = setting.clipped(setting.folding(tuple(weight.shape)))
    theirs = tensorly.tt_to_tensor(tensor_train(folded, rank=[1, *ranks, 1]))
    norm = np.linalg.norm(folded)
    assert lost(weight, setting) <= np.linalg.norm(theirs - folded) + 1e-6 * norm
    assert [core.shape[-1] for core in setting.fit(weight).cores][:-1] == list(ranks)


@given(st.sampled_from([(12, 8), (7, 9), (6, 8, 3), (31, 5)]), st.integers(1, 12), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_the_error_lies_between_the_largest_tail_and_all_of_them(shape, rank, seed):
    weight = tensor_of(*shape, seed=seed, dtype=torch.float64)
    setting = TT(rank=rank)
    folded = setting.folding(shape).fold(weight)
    ranks = setting.clipped(setting.folding(shape))
    left_out = [
        float(torch.linalg.svdvals(folded.reshape(math.prod(folded.shape[: k + 1]), -1))[r:].square().sum())
        for k, r in enumerate(ranks)
    ]
    found = setting.fit(weight)
    rebuilt = found.folding.fold(found.reconstruct().detach())
    padded = float((folded - rebuilt).square().sum())
    assert padded <= sum(left_out) + 1e-9
    if not found.folding.is_padded:  # cutting the padding off takes some of the error away
        assert padded >= max(left_out) - 1e-9


def test_a_train_of_two_modes_is_the_svd():
    weight = tensor_of(24, 20)
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 5, 19):
        assert lost(weight, TT(rank=rank, order=1)) == pytest.approx(float(values[rank:].norm()), rel=1e-5)


def test_parameters_are_those_of_the_formula():
    def count(setting, shape):
        return sum(spec.values for spec in setting.factor_specs(shape, torch.float32).values())

    ranks = (4, 6, 5)
    around = (1, *ranks, 1)
    sizes = (8, 12, 8, 16)
    expected = sum(around[k] * n * around[k + 1] for k, n in enumerate(sizes))
    assert count(TT(ranks=ranks, out_modes=(8, 12), in_modes=(8, 16)), (96, 128)) == expected
    kernel = TT(rank=3, order=1)  # Garipov et al.: out, k, in
    assert count(kernel, (64, 32, 3, 3)) == 64 * 3 + 3 * 9 * 3 + 3 * 32


def grid(rows, columns):
    return torch.arange(rows).reshape(-1, 1) * columns + torch.arange(columns)


KNOWN = {
    "ones": (torch.ones(16, 16), 1),
    "outer product of Kronecker vectors": (
        torch.outer(torch.tensor([1.0, 2, 4, 8]), torch.tensor([1.0, -1, 1, -1])),
        1,
    ),
    "exponential": ((grid(16, 16) / 100).exp(), 1),
    "sine": ((grid(16, 16) / 7.0).sin(), 2),
    "line": (grid(16, 16).float(), 2),
    "parabola": (grid(16, 16).float() ** 2, 3),
    "zero": (torch.zeros(16, 16), 1),
}


@pytest.mark.parametrize(("weight", "rank"), KNOWN.values(), ids=KNOWN.keys())
def test_known_weights_are_reached_at_their_known_rank(weight, rank):
    order = int(math.log2(len(weight)))
    found = TT.reaching(weight, 1e-5, order=order)
    assert max(found.ranks) == rank
    assert lost(weight, found) <= 1e-5 * float(weight.double().norm())


STRUCTURED = {
    "random": tensor_of(31, 37),
    "low rank": tensor_of(48, 3) @ tensor_of(3, 40, seed=1),
    "zero": torch.zeros(24, 20),
    "constant": torch.full((24, 20), -7.0),
    "trained-like": trained_like(32, 16, 3, 3),
    "one value": torch.nn.functional.pad(torch.ones(1, 1), (3, 5, 4, 7)),
    "graded": tensor_of(32, 32) * (10.0 ** -torch.arange(32)).reshape(-1, 1),
}


@pytest.mark.parametrize("weight", STRUCTURED.values(), ids=STRUCTURED.keys())
@pytest.mark.parametrize("wanted", [0.9, 0.3, 0.03, 1e-3, 1e-5])
def test_what_is_reached_is_within_the_error_and_its_last_rank_minimal(weight, wanted):
    found = TT.reaching(weight, wanted)
    allowed = wanted * float(weight.double().norm())
    assert lost(weight, found) <= allowed * (1 + 1e-6) + 1e-6 * float(weight.double().norm())
    if found.ranks[-1] > 1:
        poorer = TT(ranks=(*found.ranks[:-1], found.ranks[-1] - 1))
        assert lost(weight, poorer) > allowed * (1 - 1e-6)
