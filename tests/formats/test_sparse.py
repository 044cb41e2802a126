"""sparse against independent truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from tcompress.errors import FormatError
from tcompress.formats.sparse import Sparse


def test_the_largest_magnitudes_stay_untouched_and_the_rest_is_zero():
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    kept = Sparse(density=0.1).fit(weight).reconstruct()
    order = weight.abs().flatten().argsort(descending=True)
    assert torch.equal(kept.flatten()[order[:60]], weight.flatten()[order[:60]])
    assert not kept.flatten()[order[60:]].any()


def test_of_equal_magnitudes_the_first_are_kept():
    kept = Sparse(density=0.5).fit(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0]])).reconstruct()
    assert kept.tolist() == [[1, -1, 1], [0, 0, 0]]


@pytest.mark.parametrize(("density", "kept"), [(0, 0), (0.5, 6), (0.54, 6), (0.55, 7), (1, 12)])
def test_the_number_kept_is_the_density_rounded_half_up(density, kept):
    weight = torch.arange(1.0, 13).reshape(3, 4)
    assert int((Sparse(density=density).fit(weight).reconstruct() != 0).sum()) == kept


def test_a_tolerance_of_zero_keeps_just_the_values_that_are_not_zero():
    weight = torch.tensor([[0.0, 2.0, 0.0], [1e-30, 0.0, -3.0]])
    setting = Sparse.reaching(weight, 0.0)
    assert setting.kept(6) == 3
    assert torch.equal(setting.fit(weight).reconstruct(), weight)


def test_scipy_gets_the_same_matrix():
    weight = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    fitted = Sparse(density=0.2).fit(weight)
    found = fitted.to_scipy()
    assert isinstance(found, sparse.csr_array)
    assert found.nnz == 54
    np.testing.assert_array_equal(found.toarray(), fitted.reconstruct().detach().reshape(6, 45).numpy())


def test_scipy_gets_bfloat16_as_float32():
    matrix = torch.tensor([[0, 1.5], [-2, 0]], dtype=torch.bfloat16)
    found = Sparse(density=1).load((2, 2), {"matrix": matrix}).to_scipy()
    assert found.dtype == np.float32
    assert found.toarray().tolist() == [[0, 1.5], [-2, 0]]


@pytest.mark.parametrize("density", [-0.1, 1.1, "half", float("nan")])
def test_a_senseless_density_is_refused(density):
    with pytest.raises(FormatError, match="sparse: density must be a fraction from 0 to 1"):
        Sparse(density=density)


def test_a_weight_in_another_memory_order_is_pruned_the_same():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    across = weight.T.contiguous().T
    assert not across.is_contiguous()
    assert torch.equal(Sparse(density=0.3).fit(across).reconstruct(), Sparse(density=0.3).fit(weight).reconstruct())
