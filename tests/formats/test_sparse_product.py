"""sparse-product against independent truth; the algorithm itself is tested in linalg/test_palm.py."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from tcompress.encodings import cheapest_bytes
from tcompress.errors import FormatError
from tcompress.formats.sparse_product import SparseProduct


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lost(weight, setting):
    found = setting.fit(weight).reconstruct().detach()
    return float((found.double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_a_hadamard_matrix_is_a_product_of_as_many_butterflies_as_it_has_bits(bits):
    weight = torch.from_numpy(scipy.linalg.hadamard(2**bits)).float()
    setting = SparseProduct(nonzeros=2, count=bits)
    found = setting.fit(weight)
    assert [int((factor != 0).sum()) for factor in found.factors] == [2 * 2**bits] * bits
    assert lost(weight, setting) < 1e-6
    assert SparseProduct(nonzeros=2, count=None).pinned(tuple(weight.shape)) == setting


def test_the_identity_and_permutations_need_one_value_a_row():
    order = torch.tensor([3, 0, 7, 1, 2, 6, 4, 5])
    for weight in (torch.eye(8), torch.eye(8)[order] * -5):
        assert lost(weight, SparseProduct(nonzeros=1)) < 1e-6


def test_the_stored_bytes_bound_those_of_the_factors():
    for shape in ((24, 20), (16, 4, 3, 3)):
        for nonzeros in (1, 3, 8):
            setting = SparseProduct(nonzeros=nonzeros, count=3)
            planned = setting.factor_specs(shape, torch.float32)
            for name, factor in setting.fit(tensor_of(*shape)).state_dict().items():
                assert tuple(factor.shape) == planned[name].shape
                if name != "scale":
                    assert int(torch.count_nonzero(factor)) <= planned[name].nonzeros
            assert setting.stored_bytes(shape, torch.float32) == sum(map(cheapest_bytes, planned.values()))


def test_every_row_and_column_of_a_factor_keeps_its_largest():
    for factor in SparseProduct(nonzeros=2).fit(tensor_of(12, 10)).factors:
        kept = factor.detach() != 0
        assert kept.any(0).all()
        assert kept.any(1).all()


@pytest.mark.parametrize("weight", [torch.zeros(12, 9), torch.ones(12, 9), torch.eye(12)], ids=["zero", "ones", "eye"])
def test_what_is_reached_is_within_the_error(weight):
    found = SparseProduct.reaching(weight, 0.1)
    assert (found.fit(weight).reconstruct() - weight).norm() <= 0.1 * weight.norm() * (1 + 1e-6)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", (2,), None], ids=str)
def test_senseless_counts_are_refused_by_name(value):
    with pytest.raises(FormatError, match=r"^sparse-product: nonzeros must be a whole number of at least 1"):
        SparseProduct(nonzeros=value)
    if value is not None:
        with pytest.raises(FormatError, match=r"^sparse-product: count must be a whole number of at least 2"):
            SparseProduct(nonzeros=1, count=value)


def test_factors_that_do_not_follow_each_other_are_told():
    found = SparseProduct(nonzeros=2, count=3).fit(tensor_of(12, 9))
    factors = dict(found.state_dict())
    assert torch.equal(SparseProduct(nonzeros=1, count=3).load((12, 9), factors).reconstruct(), found.reconstruct())
    for broken in (
        {name: factor for name, factor in factors.items() if name != "factors.1"},
        {name: factor for name, factor in factors.items() if name != "scale"},
        {**factors, "factors.1": factors["factors.1"][:-1]},
        {**factors, "factors.1": torch.tensor(1.0)},
        {**factors, "scale": torch.ones(2)},
        {name: factor for name, factor in factors.items() if name != "factors.2"},
        {},
    ):
        with pytest.raises(FormatError, match=r"^sparse-product: "):
            SparseProduct(nonzeros=2, count=3).load((12, 9), broken)
