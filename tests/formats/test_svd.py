"""svd against independent truth."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import FormatError
from tcompress.formats.svd import SVD


def test_the_error_is_that_of_eckart_and_young():
    weight = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(weight.double())
    for rank in (1, 5, 20, 39):
        lost = (weight - SVD(rank=rank).fit(weight).reconstruct()).double().norm()
        torch.testing.assert_close(lost, values[rank:].norm(), rtol=1e-5, atol=1e-6)


def test_both_factors_share_the_singular_values():
    weight = 1e6 * torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    factors = SVD(rank=4).fit(weight).state_dict()
    torch.testing.assert_close(factors["left"].norm(), factors["right"].norm(), rtol=1e-4, atol=0)


def test_parameters_are_those_of_the_formula():
    specs = SVD(rank=8).factor_specs((384, 1536), torch.float32)
    assert sum(spec.values for spec in specs.values()) == 8 * (384 + 1536)


def test_a_rank_above_the_dimensions_is_clipped():
    assert SVD(rank=99).factor_specs((4, 6), torch.float32)["left"].shape == (4, 4)
    assert SVD(rank=99).fit(torch.ones(4, 6)).state_dict()["left"].shape == (4, 4)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "8", True])
def test_a_senseless_rank_is_refused(rank):
    with pytest.raises(FormatError, match="svd: rank must be a whole number of at least 1"):
        SVD(rank=rank)
