"""Tucker decompositions against their theory, and tensorly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker

from tcompress.errors import NumericalError
from tcompress.linalg.tucker import ranks_for_error, st_hosvd, tucker, tucker_full, usable_ranks

sizes_lists = st.lists(st.integers(1, 6), min_size=2, max_size=4)


def tensor_of(*sizes, seed=0, dtype=torch.float64):
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unfolded(tensor, mode):
    return tensor.transpose(0, mode).reshape(tensor.shape[mode], -1)


def tails(tensor, ranks):
    """What the best approximation of each mode unfolding leaves out; nothing where a mode is left whole."""
    return [
        0.0 if rank is None else float(torch.linalg.svdvals(unfolded(tensor, mode))[rank:].square().sum())
        for mode, rank in enumerate(ranks)
    ]


def lost(tensor, found):
    return float((tensor - tucker_full(*found)).square().sum())


def some_ranks(data, sizes):
    return [data.draw(st.one_of(st.none(), st.integers(1, size))) for size in sizes]


@given(sizes_lists, st.data())
@settings(deadline=None, max_examples=30)
def test_the_error_lies_between_the_largest_tail_and_all_of_them(sizes, data):
    tensor, ranks = tensor_of(*sizes, seed=data.draw(st.integers(0, 99))), some_ranks(data, sizes)
    left_out = tails(tensor, ranks)
    started, improved = lost(tensor, st_hosvd(tensor, ranks)), lost(tensor, tucker(tensor, ranks))
    assert max(left_out) - 1e-9 <= improved <= started + 1e-9
    assert started <= sum(left_out) + 1e-9


@given(sizes_lists, st.data())
@settings(deadline=None, max_examples=30)
def test_factors_are_orthonormal_and_the_core_is_the_projection(sizes, data):
    tensor, ranks = tensor_of(*sizes, seed=1), some_ranks(data, sizes)
    core, factors = tucker(tensor, ranks)
    for factor in factors:
        if factor is not None:
            torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64))
    projected = tucker_full(tensor, [None if factor is None else factor.T for factor in factors])
    torch.testing.assert_close(core, projected)


@given(sizes_lists, st.integers(1, 5), st.data())
@settings(deadline=None, max_examples=30)
def test_usable_ranks_are_those_that_a_random_core_has(sizes, free, data):
    asked = data.draw(st.tuples(*[st.integers(1, 9)] * len(sizes)))
    factors = [tensor_of(size, rank, seed=mode) for mode, (size, rank) in enumerate(zip(sizes, asked, strict=True))]
    tensor = tucker_full(tensor_of(*asked, free, seed=9), [*factors, None])
    found = tuple(int(torch.linalg.matrix_rank(unfolded(tensor, mode))) for mode in range(len(sizes)))
    assert usable_ranks(sizes, asked, free=free) == found


@given(sizes_lists, st.floats(0.001, 0.9), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_ranks_for_an_error_reach_it(sizes, wanted, seed):
    tensor = tensor_of(*sizes, seed=seed)
    ranks = ranks_for_error(tensor, wanted, range(len(sizes)))
    assert math.sqrt(lost(tensor, tucker(tensor, ranks))) <= wanted * float(tensor.norm()) * (1 + 1e-6)


def test_a_planted_core_is_found_again():
    factors = [tensor_of(size, rank, seed=rank) for size, rank in ((9, 2), (8, 3), (7, 4))]
    tensor = tucker_full(tensor_of(2, 3, 4), factors)
    assert ranks_for_error(tensor, 1e-9, range(3)) == (2, 3, 4)
    assert lost(tensor, tucker(tensor, (2, 3, 4))) < 1e-18 * float(tensor.square().sum())


# Of noise every start leads to a local optimum of its own, as good or bad as another: there only nearly the same.
KINDS = {
    "random": (torch.ones(24), 2e-3),
    "decaying": (torch.arange(1, 25) ** -1.0, 1e-6),
    "fast": (0.6 ** torch.arange(24), 1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("decay", "excess"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("ranks", [(3, 3, None), (6, 4, None), (5, 5, 4), (2, None, 3)], ids=str)
def test_the_error_is_at_most_tensorlys(ranks, decay, excess, dtype):
    tensor = tensor_of(24, 20, 9, seed=2) * decay.reshape(24, 1, 1) * decay[:20, None] * decay[:9]
    truth = tensor.to(dtype).double().numpy()
    modes = [mode for mode, rank in enumerate(ranks) if rank is not None]
    (core, factors), _ = partial_tucker(truth, rank=[r for r in ranks if r], modes=modes, init="svd", tol=1e-6)
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=modes)
    ours = tucker_full(*tucker(tensor.to(dtype), ranks)).double().numpy()
    assert np.linalg.norm(ours - truth) <= np.linalg.norm(theirs - truth) + excess * np.linalg.norm(truth)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_the_size_of_float64_values_does_not_matter(size):
    tensor = tensor_of(6, 5, 7)
    plain, scaled = (tucker_full(*tucker(each, (3, 2, 3))) for each in (tensor, tensor * size))
    torch.testing.assert_close(scaled / size, plain, rtol=1e-6, atol=1e-9)
    assert ranks_for_error(tensor * size, 0.4, range(3)) == ranks_for_error(tensor, 0.4, range(3))


def test_a_core_beyond_the_range_is_refused():
    with pytest.raises(NumericalError, match=r"exceeds the range of torch\.float32"):
        tucker(torch.full((6, 5, 7), 3e38), (2, 2, 2))
