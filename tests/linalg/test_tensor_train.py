"""Tensor trains against their theory: error bounds, exact ranks, and tensorly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train

from tcompress.linalg.tensor_train import full_ranks, ranks_for_error, tt_full, tt_svd, usable_ranks

sizes_lists = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def tensor_of(*sizes, seed=0, dtype=torch.float64):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tails(tensor, ranks):
    """What the best approximation of each unfolding (i1..ik | rest) leaves out."""
    cuts = range(1, tensor.ndim)
    unfoldings = [tensor.reshape(math.prod(tensor.shape[:k]), -1) for k in cuts]
    return [
        float(torch.linalg.svdvals(each)[rank:].square().sum()) for each, rank in zip(unfoldings, ranks, strict=True)
    ]


@given(sizes_lists, st.data())
@settings(deadline=None, max_examples=40)
def test_the_error_lies_between_the_largest_tail_and_all_of_them(sizes, data):
    tensor = tensor_of(*sizes, seed=data.draw(st.integers(0, 99)))
    ranks = usable_ranks(sizes, data.draw(st.tuples(*[st.integers(1, 8)] * (len(sizes) - 1))))
    lost = float((tensor - tt_full(tt_svd(tensor, ranks))).square().sum())
    left_out = tails(tensor, ranks)
    assert max(left_out) - 1e-9 <= lost <= sum(left_out) + 1e-9


@given(sizes_lists, st.data())
@settings(deadline=None, max_examples=40)
def test_usable_ranks_are_those_that_a_random_train_has(sizes, data):
    asked = data.draw(st.tuples(*[st.integers(1, 9)] * (len(sizes) - 1)))
    around = (1, *asked, 1)
    tensor = tt_full([tensor_of(around[k], n, around[k + 1], seed=k) for k, n in enumerate(sizes)])
    found = [int(torch.linalg.matrix_rank(tensor.reshape(math.prod(sizes[:k]), -1))) for k in range(1, len(sizes))]
    assert usable_ranks(sizes, asked) == tuple(found)


def test_full_ranks_are_those_of_t3f():
    assert full_ranks((2, 1, 4, 3, 3)) == (2, 2, 8, 3)
    assert usable_ranks((2, 1, 4, 3, 3), (15, 15, 15, 15)) == (2, 2, 8, 3)


@given(sizes_lists, st.floats(0.001, 0.9), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_ranks_for_an_error_reach_it_and_the_last_is_minimal(sizes, wanted, seed):
    tensor = tensor_of(*sizes, seed=seed)
    ranks = ranks_for_error(tensor, wanted)
    allowed = wanted * float(tensor.norm())
    assert float((tensor - tt_full(tt_svd(tensor, ranks))).norm()) <= allowed * (1 + 1e-6)
    if ranks[-1] > 1:
        poorer = (*ranks[:-1], ranks[-1] - 1)
        assert float((tensor - tt_full(tt_svd(tensor, poorer))).norm()) > allowed


def grid(count, *, order):
    """Points of a grid of ``order`` axes, summed: (count, ..., count)."""
    axes = torch.meshgrid(*[torch.linspace(0, 1, count, dtype=torch.float64)] * order, indexing="ij")
    return sum(axes[1:], axes[0])


def digits_line(bits):
    return torch.linspace(-1, 1, 2**bits, dtype=torch.float64)


EXACT = {
    "ones": (torch.ones(3, 4, 5, 6, dtype=torch.float64), 1),
    "exponential of a sum": (grid(5, order=4).exp(), 1),
    "sum of functions of one index": (
        tensor_of(3, 1, 1, 1) + tensor_of(1, 4, 1, 1) + tensor_of(1, 1, 5, 1) + tensor_of(1, 1, 1, 6),
        2,
    ),
    "sine of a sum": (grid(5, order=4).sin(), 2),
    "quantised exponential": (digits_line(8).exp().reshape([2] * 8), 1),
    "quantised sine": ((9 * digits_line(8)).sin().reshape([2] * 8), 2),
    **{
        f"quantised polynomial of degree {p}": (
            sum(digits_line(8) ** k * (k + 1) for k in range(p + 1)).reshape([2] * 8),
            p + 1,
        )
        for p in range(4)
    },
}


@pytest.mark.parametrize(("tensor", "rank"), EXACT.values(), ids=EXACT.keys())
def test_known_tensors_have_their_known_rank(tensor, rank):
    assert max(ranks_for_error(tensor, 1e-10)) == rank
    rebuilt = tt_full(tt_svd(tensor, (rank,) * (tensor.ndim - 1)))
    torch.testing.assert_close(rebuilt, tensor, rtol=1e-9, atol=1e-9)
    if rank > 1:
        poorer = tt_full(tt_svd(tensor, (rank - 1,) * (tensor.ndim - 1)))
        assert float((poorer - tensor).norm() / tensor.norm()) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 3, 2), (4, 9, 5), (7, 20, 8)])
def test_the_error_is_at_most_tensorlys(ranks, dtype):
    decay = torch.arange(1, 9, dtype=torch.float64) ** -1.0
    tensor = tensor_of(8, 8, 8, 8, seed=3) * torch.einsum("i,j,k,l->ijkl", decay, decay, decay, decay)
    tensor = tensor.to(dtype)
    theirs = tensorly.tt_to_tensor(tensor_train(tensor.double().numpy(), rank=[1, *ranks, 1]))
    ours = tt_full(tt_svd(tensor, ranks)).double().numpy()
    truth = tensor.double().numpy()
    assert np.linalg.norm(ours - truth) <= np.linalg.norm(theirs - truth) + 1e-6 * np.linalg.norm(truth)


def test_a_train_of_rank_two_three_is_found_again():
    around = (1, 2, 3, 1)
    tensor = tt_full([tensor_of(around[k], 3, around[k + 1], seed=k) for k in range(3)])
    assert ranks_for_error(tensor, 1e-9) == (2, 3)
    assert float((tensor - tt_full(tt_svd(tensor, (2, 3)))).norm() / tensor.norm()) < 1e-9


def test_all_cores_but_the_last_are_orthonormal():
    *cores, _ = tt_svd(tensor_of(4, 5, 6, 3), (3, 5, 2))
    for core in cores:
        matrix = core.reshape(-1, core.shape[2])
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(core.shape[2], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_the_size_of_float64_values_does_not_matter(size):
    tensor = tensor_of(6, 5, 7)
    assert ranks_for_error(tensor * size, 0.4) == ranks_for_error(tensor, 0.4)
