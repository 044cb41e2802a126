"""cp against independent truth; the algorithm itself is tested in linalg/test_cp.py."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly
import torch
from tensorly.decomposition import parafac

from tcompress.formats.cp import CP


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lost(weight, setting):
    return float((setting.fit(weight).reconstruct().detach().double() - weight.double()).norm())


def values(setting, shape):
    return sum(spec.values for spec in setting.factor_specs(shape, torch.float32).values())


def test_parameters_are_those_of_the_formula_and_a_weight_each():
    assert values(CP(rank=7), (64, 32, 3, 3)) == 7 * (64 + 32 + 9 + 1)
    folded = CP(rank=7, out_modes=(4, 4, 4), in_modes=(2, 4, 4))
    assert values(folded, (64, 32, 3, 3)) == 7 * (4 * 2 + 4 * 4 + 4 * 4 + 9 + 1)
    assert values(folded, (64, 32)) == 7 * (4 * 2 + 4 * 4 + 4 * 4 + 1)


def planted(*shape, rank):
    left, right, kernel = (tensor_of(size, rank, seed=k) for k, size in enumerate((*shape[:2], 9)))
    return torch.einsum("ar,br,kr->abk", left, right, kernel).reshape(shape)


def test_planted_components_are_found_at_their_number():
    weight = planted(24, 16, 3, 3, rank=4)
    assert lost(weight, CP(rank=4)) < 1e-3 * float(weight.norm())
    assert lost(weight, CP(rank=3)) > 0.1 * float(weight.norm())
    assert CP.reaching(weight, 0.01).rank == 4


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_the_error_is_at_most_tensorlys(rank):
    weight = planted(24, 16, 3, 3, rank=6) + 0.3 * tensor_of(24, 16, 3, 3, seed=9)
    folded = weight.double().numpy().reshape(24, 16, 9)
    theirs = tensorly.cp_to_tensor(parafac(folded, rank, n_iter_max=100, init="svd", tol=1e-6, random_state=0))
    assert lost(weight, CP(rank=rank)) <= np.linalg.norm(theirs - folded) + 0.01 * np.linalg.norm(folded)


def test_a_matrix_of_two_pairs_is_decomposed_by_the_svd_of_its_pairs():
    weight = tensor_of(24, 20)
    paired = weight.reshape(4, 6, 4, 5).permute(0, 2, 1, 3).reshape(16, 30)
    tail = torch.linalg.svdvals(paired.double())[5:].norm()
    setting = CP(rank=5, out_modes=(4, 6), in_modes=(4, 5))
    assert lost(weight, setting) == pytest.approx(float(tail), rel=1e-5)


def test_a_kronecker_product_is_one_component():
    weight = torch.kron(torch.kron(tensor_of(3, 4), tensor_of(4, 2, seed=1)), tensor_of(2, 3, seed=2))
    assert lost(weight, CP(rank=1, out_modes=(3, 4, 2), in_modes=(4, 2, 3))) < 1e-5 * float(weight.norm())


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(24, 20), torch.full((24, 20), -7.0), planted(24, 16, 3, 3, rank=2)],
    ids=["zero", "constant", "two components"],
)
@pytest.mark.parametrize("wanted", [0.3, 0.01, 1e-3])
def test_what_is_reached_is_within_the_error(weight, wanted):
    assert lost(weight, CP.reaching(weight, wanted)) <= wanted * float(weight.double().norm())


def test_one_component_more_does_not_end_at_a_visibly_larger_error():
    """Five components are exact; with six, of which one is too many, the last digits come slowly."""
    weight = tensor_of(1, 40)
    five, six = (lost(weight, CP(rank=rank)) / float(weight.norm()) for rank in (5, 6))
    assert six <= five + 1e-3
