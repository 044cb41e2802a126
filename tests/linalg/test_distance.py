"""Errors are measured in float64, whatever the weight's type and range."""

from __future__ import annotations

import math

import pytest
import torch

from tcompress.linalg.distance import compare, frobenius_norm


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


@pytest.mark.parametrize(("size", "apart"), [(1e30, 1e-15), (1.0, 1e-200), (1e300, 1e-10), (1.7e308, 1.0)])
def test_an_error_that_is_far_below_the_largest_value_is_not_lost(size, apart):
    weight = torch.tensor([size, apart, 0.0, size], dtype=torch.float64)
    rebuilt = torch.tensor([size, 0.0, 0.0, size], dtype=torch.float64)
    assert compare(weight, rebuilt)[1] == pytest.approx(apart / size / math.sqrt(2), rel=1e-12, abs=0)


def test_the_difference_of_nearly_equal_values_is_exact():
    weight = torch.full((40, 48), 0.7, dtype=torch.float64)
    rebuilt = weight.clone()
    rebuilt[::3] = math.nextafter(0.7, 0)
    expected = math.sqrt(14 * 48) * (0.7 - math.nextafter(0.7, 0)) / (0.7 * math.sqrt(40 * 48))
    assert compare(weight, rebuilt)[1] == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_norm_beyond_float64_is_infinite_and_the_error_is_still_right():
    weight = torch.full((2, 8), 1.7e308, dtype=torch.float64)
    assert compare(weight, weight / 2) == (math.inf, pytest.approx(0.5, rel=1e-12, abs=0))
    assert compare(weight, -weight) == (math.inf, pytest.approx(2.0, rel=1e-12, abs=0))
    assert frobenius_norm(weight) == math.inf


def test_an_error_among_the_smallest_values_has_all_its_digits():
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64) * 5e-324
    rebuilt = torch.tensor([0.0, 0, 0, 1, 1, 1, 1], dtype=torch.float64) * 5e-324
    assert compare(weight, rebuilt)[1] == pytest.approx(math.sqrt(3 / 7), rel=1e-12)
