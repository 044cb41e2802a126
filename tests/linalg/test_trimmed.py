"""Low-rank fits that leave entries out: planted matrices come back, and what is left out is never looked at."""

from __future__ import annotations

import itertools

import pytest
import torch

from tcompress.linalg.magnitude import keep_largest
from tcompress.linalg.svd import truncated_svd
from tcompress.linalg.trimmed import Product, fit_trimmed, power_step, trimmed_error


def planted(m: int, n: int, rank: int, support: float, size: float, seed: int = 0):
    """Return a matrix of low rank, and sparse entries to be added, of so many times its root mean square."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank**0.5
    where = torch.rand(m, n, generator=generator) < support
    return low, torch.where(where, size * torch.randn(m, n, generator=generator), 0)


def start(matrix: torch.Tensor, rank: int) -> Product:
    left, values, right = truncated_svd(matrix, rank)
    return Product(left, values[:, None] * right)


def product(part: Product) -> torch.Tensor:
    return part.left @ part.right


@pytest.mark.parametrize("size", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("m", "n"), [(200, 200), (120, 400), (400, 120)])
def test_planted_low_rank_plus_sparse_is_recovered(m, n, size):
    rank = min(m, n) // 20
    low, sparse = planted(m, n, rank, 0.05, size)
    matrix = low + sparse
    part = fit_trimmed(matrix, start(matrix, rank), power_step, rounds=60, count=int((sparse != 0).sum()))
    assert (product(part) - low).norm() <= 2e-5 * low.norm()


def test_half_of_the_entries_are_enough_for_the_others():
    low, _ = planted(200, 300, 8, 0, 0)
    out = torch.rand(low.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    known = torch.where(out, 0, low)
    part = fit_trimmed(known, start(known, 8), power_step, rounds=100, left_out=out)
    assert (product(part) - low).norm() <= 1e-5 * low.norm()


def test_the_error_never_rises_above_that_of_the_start():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        matrix = torch.randn(30, 40, generator=generator) ** 3
        first = start(matrix, 4)
        for count in (1, 100, 600, 1199):
            part = fit_trimmed(matrix, first, power_step, rounds=15, count=count)
            assert trimmed_error(matrix, part, count) <= trimmed_error(matrix, first, count)


def test_more_rounds_are_never_worse():
    matrix = torch.randn(60, 80, generator=torch.Generator().manual_seed(3))
    errors = [
        trimmed_error(matrix, fit_trimmed(matrix, start(matrix, 5), power_step, rounds=rounds, count=1200), 1200)
        for rounds in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert errors[-1] < 0.97 * errors[0]
    assert all(later <= earlier * 1.01 for earlier, later in itertools.pairwise(errors))


def test_twenty_rounds_leave_less_than_eighty_of_the_plain_alternation():
    matrix = torch.randn(96, 128, generator=torch.Generator().manual_seed(4))
    count, sparse = matrix.numel() // 2, torch.zeros(96, 128)
    for _ in range(80):
        plain = start(matrix - sparse, 8)
        sparse = keep_largest(matrix - product(plain), count)
    quick = fit_trimmed(matrix, start(matrix, 8), power_step, rounds=20, count=count)
    assert trimmed_error(matrix, quick, count) < trimmed_error(matrix, plain, count)


def test_the_trimmed_error_is_that_of_sorting():
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(5))
    part = start(matrix, 3)
    rest = (matrix - product(part)).abs().flatten().sort().values
    for count in (1, 77, 599):
        assert trimmed_error(matrix, part, count) == pytest.approx(float(rest[: 600 - count].norm()), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
def test_the_size_of_the_values_does_not_matter(scale):
    low, sparse = planted(64, 64, 3, 0.05, 1.0)
    matrix = (low + sparse) * scale
    part = fit_trimmed(matrix, start(matrix, 3), power_step, rounds=40, count=int((sparse != 0).sum()))
    assert (product(part) / scale - low).norm() <= 1e-4 * low.norm()


def test_equal_magnitudes_and_zeros_are_no_trouble():
    for matrix in (torch.ones(16, 16), torch.zeros(16, 16), torch.eye(16), torch.ones(16, 16).tril()):
        part = fit_trimmed(matrix, start(matrix, 2), power_step, rounds=10, count=50)
        assert product(part).isfinite().all()
