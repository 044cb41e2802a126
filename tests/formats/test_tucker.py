"""tucker against independent truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import partial_tucker

from tcompress.formats.tucker import Tucker


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained_like(*shape):
    left, right = tensor_of(shape[0], 12), tensor_of(shape[1], 12, seed=1)
    spatial = tensor_of(math.prod(shape[2:]), 12, seed=2)
    found = torch.einsum("ar,br,kr,r->abk", left, right, spatial, torch.arange(1, 13) ** -1.5)
    return (found + 0.02 * tensor_of(*found.shape, seed=3)).reshape(shape)


def lost(weight, setting):
    return float((setting.fit(weight).reconstruct().detach().double() - weight.double()).norm())


def values(setting, shape):
    return sum(spec.values for spec in setting.factor_specs(shape, torch.float32).values())


def test_parameters_of_tucker_2_are_those_of_the_formula():
    assert values(Tucker(ranks=(20, 10)), (64, 32, 3, 3)) == 64 * 20 + 20 * 10 * 9 + 10 * 32


def test_parameters_of_r_tk_are_those_of_the_formula():
    setting = Tucker(ranks=(2, 3, 4, 5), out_modes=(8, 8), in_modes=(4, 8))
    assert values(setting, (64, 32, 3, 3)) == 8 * 2 + 8 * 3 + 4 * 4 + 8 * 5 + 2 * 3 * 4 * 5 * 9


# Of a random tensor every start leads to a local optimum of its own, as good or bad as another.
CASES = {
    "random kernel": (tensor_of(64, 64, 3, 3), 1e-3),
    "trained-like kernel": (trained_like(64, 64, 3, 3), 1e-6),
    "one-dimensional kernel": (trained_like(40, 24, 5), 1e-5),
}


@pytest.mark.parametrize(("weight", "excess"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("ranks", [(1, 1), (8, 4), (24, 16)], ids=str)
def test_the_error_of_tucker_2_is_at_most_tensorlys(weight, excess, ranks):
    folded = weight.double().numpy().reshape(*weight.shape[:2], -1)
    (core, factors), _ = partial_tucker(folded, rank=list(ranks), modes=[0, 1], init="svd", tol=1e-6)
    theirs = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    norm = np.linalg.norm(folded)
    assert lost(weight, Tucker(ranks=ranks)) <= np.linalg.norm(theirs - folded) + excess * norm


@pytest.mark.parametrize("ranks", [(2, 3, 3, 2), (4, 8, 6, 5)], ids=str)
def test_the_error_of_a_folded_matrix_is_at_most_tensorlys(ranks):
    weight = trained_like(96, 128, 1).reshape(96, 128)
    folded = weight.double().numpy().reshape(8, 12, 16, 8)
    (core, factors), _ = partial_tucker(folded, rank=list(ranks), modes=[0, 1, 2, 3], init="svd", tol=1e-6)
    theirs = tensorly.tenalg.multi_mode_dot(core, factors)
    setting = Tucker(ranks=ranks, out_modes=(8, 12), in_modes=(16, 8))
    assert lost(weight, setting) <= np.linalg.norm(theirs - folded) + 1e-6 * np.linalg.norm(folded)


@given(st.sampled_from([(12, 8), (7, 9), (6, 8, 3), (5, 4, 2, 2)]), st.integers(1, 9), st.sampled_from([None, 2]))
@settings(deadline=None, max_examples=40)
def test_the_error_lies_between_the_largest_tail_and_all_of_them(shape, rank, order):
    weight, setting = tensor_of(*shape, dtype=torch.float64), Tucker(rank=rank, order=order)
    folding = setting.folding(shape)
    folded = folding.fold(weight)
    left_out = [
        float(torch.linalg.svdvals(folded.movedim(mode, 0).reshape(folded.shape[mode], -1))[r:].square().sum())
        for mode, r in enumerate(setting.clipped(folding))
    ]
    found = lost(weight, setting) ** 2
    assert found <= sum(left_out) + 1e-9
    if not folding.is_padded:
        assert found >= max(left_out) - 1e-9


def test_tucker_of_one_mode_a_side_is_the_svd_of_a_matrix():
    weight = tensor_of(24, 20)
    tail = torch.linalg.svdvals(weight.double())[6:].norm()
    assert lost(weight, Tucker(rank=6, order=1)) == pytest.approx(float(tail), rel=1e-5)


def test_planted_channel_ranks_are_found():
    weight = torch.einsum("ap,bq,pqk->abk", tensor_of(24, 5), tensor_of(16, 3, seed=1), tensor_of(5, 3, 9, seed=2))
    weight = weight.reshape(24, 16, 3, 3)
    assert Tucker.reaching(weight, 1e-5).ranks == (5, 3)
    assert lost(weight, Tucker(ranks=(5, 3))) < 1e-5 * float(weight.norm())
    assert lost(weight, Tucker(ranks=(4, 3))) > 1e-2 * float(weight.norm())


@pytest.mark.parametrize(
    "weight",
    [torch.ones(16, 24), torch.outer(torch.arange(1.0, 17), torch.ones(24)), torch.zeros(16, 24)],
    ids=["ones", "line times ones", "zero"],
)
def test_rank_one_tensors_have_rank_one_or_that_of_their_modes(weight):
    # A line of 16 values, folded 4 x 4, is a sum of functions of one index each: rank 2.
    expected = {1, 2} if weight.std() > 0 else {1}
    assert set(Tucker.reaching(weight, 1e-5, order=2).ranks) == expected


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
    found, norm = Tucker.reaching(weight, wanted), float(weight.double().norm())
    assert lost(weight, found) <= wanted * norm * (1 + 1e-6) + 1e-6 * norm
    if found.ranks[-1] > 1:
        poorer = Tucker(ranks=(*found.ranks[:-1], found.ranks[-1] - 1))
        assert lost(weight, poorer) > wanted * norm * (1 - 1e-6)
