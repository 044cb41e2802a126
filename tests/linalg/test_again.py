"""Decompositions of decompositions, against those of the whole matrix or tensor that they stand for."""

from __future__ import annotations

import pytest
import torch

from tcompress.linalg.again import inner_matrix, inner_tensor, lowered_matrix, lowered_tensor
from tcompress.linalg.tucker import tucker, tucker_full, unfolding


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("m", "r", "n"), [(40, 7, 25), (9, 7, 300), (300, 7, 9), (5, 7, 30), (30, 7, 5)])
def test_the_core_of_a_product_has_its_singular_values(m, r, n):
    left, right = drawn(m, r), drawn(r, n, seed=1) * torch.logspace(0, -3, r)[:, None]
    outer, core, inner = inner_matrix(left, right)
    torch.testing.assert_close(outer @ core @ inner, left @ right)
    assert core.shape == (min(m, r), min(r, n))
    wanted = torch.linalg.svdvals(left @ right)[: min(core.shape)]
    torch.testing.assert_close(torch.linalg.svdvals(core), wanted)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_product_of_lower_rank_is_the_best_one(rank):
    left, right = drawn(40, 7).float(), drawn(7, 25, seed=1).float()
    one, other = lowered_matrix(inner_matrix(left, right), rank)
    u, s, v = torch.linalg.svd((left @ right).double(), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(one @ other, best, atol=1e-5, rtol=1e-5)
    assert one.shape == (40, rank)
    assert one.dtype == other.dtype == torch.float64
    torch.testing.assert_close(one.T @ one, other @ other.T, atol=1e-4, rtol=1e-4)


def test_the_unfoldings_of_a_core_have_the_singular_values_of_the_whole():
    core, factors = drawn(6, 5, 9), [drawn(20, 6, seed=1), drawn(4, 5, seed=2), None]
    whole = tucker_full(core, factors)
    inner, bases = inner_tensor(core, factors)
    torch.testing.assert_close(tucker_full(inner, bases), whole)
    assert tuple(inner.shape) == (6, 4, 9), "no mode of the core is larger than the whole one's"
    for mode in (0, 1):
        found = torch.linalg.svdvals(unfolding(inner, mode))
        torch.testing.assert_close(found, torch.linalg.svdvals(unfolding(whole, mode))[: len(found)])


@pytest.mark.parametrize("ranks", [(4, 3, None), (2, 5, None), (6, 1, None)])
def test_a_core_of_lower_ranks_is_the_decomposition_of_the_whole(ranks):
    core, factors = drawn(6, 5, 9).float(), [drawn(20, 6, seed=1).float(), drawn(14, 5, seed=2).float(), None]
    whole = tucker_full(core.double(), [None if each is None else each.double() for each in factors])
    smaller, *lowered = lowered_tensor(*inner_tensor(core, factors), ranks)
    assert tuple(smaller.shape) == (*ranks[:2], 9)
    wanted = tucker_full(*tucker(whole, ranks))
    found = tucker_full(smaller, [*lowered, None])
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
    assert float((found - whole).norm()) == pytest.approx(float((wanted - whole).norm()), rel=1e-5)
