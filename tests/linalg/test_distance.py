"""Errors are measured in float64, whatever the weight's type and range."""

from __future__ import annotations

import math

import pytest
import torch

from tcompress.linalg.distance import compare


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_exact_to_the_last_digits_of_float64(dtype):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight, rebuilt = (torch.randn(37, 11, generator=generator).to(dtype) for _ in range(2))
        values = zip(weight.double().flatten().tolist(), rebuilt.double().flatten().tolist(), strict=True)
        lost = math.sqrt(math.fsum((a - b) ** 2 for a, b in values))
        norm = math.sqrt(math.fsum(a**2 for a in weight.double().flatten().tolist()))
        assert compare(weight, rebuilt) == pytest.approx((norm, lost / norm), rel=1e-14)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 1e37), (torch.float32, 1e-37), (torch.float64, 1e300), (torch.float64, 1e-300)],
    ids=str,
)
def test_no_range_is_too_large_or_too_small(dtype, scale):
    weight = torch.tensor([3.0, 4.0], dtype=dtype) * scale
    norm, error = compare(weight, weight / 2)
    assert norm == pytest.approx(5 * scale, rel=1e-6)
    assert error == pytest.approx(0.5, rel=1e-6)


def test_an_all_zero_weight_has_no_error_or_an_infinite_one():
    assert compare(torch.zeros(3), torch.zeros(3)) == (0.0, 0.0)
    assert compare(torch.zeros(3), torch.ones(3)) == (0.0, math.inf)
