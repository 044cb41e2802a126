"""Fits in the metric of a layer's input: closed forms against brute force, and each search against where it began."""

from __future__ import annotations

import math

import pytest
import torch

from tcompress.errors import NumericalError
from tcompress.linalg.magnitude import keep_largest
from tcompress.linalg.output_error import (
    alternate_in_metric,
    best_in_metric,
    diagonal_of,
    low_rank_in_metric,
    output_error,
    refit_on_support,
    require_moment,
    root_of,
    sparse_in_metric,
    times,
    whole_of,
)
from tcompress.linalg.svd import truncated_svd
from tcompress.linalg.trimmed import Product


def moment_of(fan_in: int, seed: int = 0, samples: int = 500, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(fan_in, fan_in, generator=generator) * torch.rand(fan_in, generator=generator) ** 2
    inputs = (torch.randn(samples, fan_in, generator=generator) @ mixing + 0.2).to(dtype)
    return inputs.T @ inputs / samples


MATRIX = torch.randn(20, 16, generator=torch.Generator().manual_seed(9))


def test_the_error_is_the_root_mean_square_of_the_outputs():
    generator = torch.Generator().manual_seed(1)
    inputs, error = torch.randn(50, 8, generator=generator), torch.randn(5, 8, generator=generator)
    squares = (inputs @ error.T).square().sum(dim=1).mean()
    assert output_error(error, inputs.T @ inputs / 50) == pytest.approx(math.sqrt(float(squares)), rel=1e-5)


def test_a_diagonal_is_the_matrix_with_it():
    diagonal = torch.rand(16, generator=torch.Generator().manual_seed(2))
    assert output_error(MATRIX, diagonal) == pytest.approx(output_error(MATRIX, diagonal.diag()), rel=1e-6)
    torch.testing.assert_close(root_of(diagonal).diag() @ root_of(diagonal).diag(), diagonal.diag())


def test_a_block_is_the_matrix_that_holds_it_again_and_again():
    block = moment_of(4)
    whole = torch.block_diag(block, block, block, block)
    assert torch.equal(whole_of(block, 16), whole)
    assert torch.equal(diagonal_of(block, 16), whole.diagonal())
    torch.testing.assert_close(times(MATRIX, block), MATRIX @ whole)
    assert output_error(MATRIX, block) == pytest.approx(output_error(MATRIX, whole), rel=1e-6)


@pytest.mark.parametrize("rows", [20, 8])  # more and fewer than columns
def test_what_is_found_for_a_block_is_what_is_found_for_the_whole(rows):
    block, matrix = moment_of(4).double(), MATRIX[:rows].double()
    whole = whole_of(block, 16)
    one, other = best_in_metric(matrix, 3, block), best_in_metric(matrix, 3, whole)
    torch.testing.assert_close(one.left @ one.right, other.left @ other.right)
    pruned = [sparse_in_metric(matrix, gram, lambda values: keep_largest(values, 60)) for gram in (block, whole)]
    torch.testing.assert_close(*pruned)


@pytest.mark.parametrize("samples", [500, 5])  # of five inputs the moment is singular
def test_the_low_rank_part_is_the_best_of_its_rank(samples):
    gram = moment_of(16, samples=samples, dtype=torch.float64)
    matrix, root = MATRIX.double(), root_of(gram)
    torch.testing.assert_close(root @ root.T, gram)
    values = torch.linalg.svdvals(matrix @ root)
    for rank in (1, 3, 7):
        part = low_rank_in_metric(matrix, rank, root)
        best = float(values[rank:].norm())
        assert output_error(matrix - part.left @ part.right, gram) == pytest.approx(best, rel=1e-5, abs=1e-6)
        left, kept, right = truncated_svd(matrix, rank)
        assert best <= output_error(matrix - (left * kept) @ right, gram) + 1e-6


@pytest.mark.parametrize("shape_of_gram", ["full", "diagonal"])
@pytest.mark.parametrize("count", [16, 100, 300])
def test_alternating_is_never_worse_than_its_start(shape_of_gram, count):
    gram = moment_of(16)
    gram = gram if shape_of_gram == "full" else gram.diagonal().clone()
    left, values, right = truncated_svd(MATRIX, 3)
    first, root = Product(left, values[:, None] * right), root_of(gram)
    before = MATRIX - first.left @ first.right
    scale = (gram if gram.ndim == 1 else gram.diagonal()).sqrt()
    pruned = torch.where(keep_largest(before * scale, count) != 0, before, 0)
    part, sparse = alternate_in_metric(
        MATRIX, gram, first, lambda target, _: low_rank_in_metric(target, 3, root), count=count, rounds=30
    )
    assert int((sparse != 0).sum()) <= count
    after = output_error(MATRIX - part.left @ part.right - sparse, gram)
    assert after < 0.9 * output_error(before - pruned, gram)


def test_values_on_a_support_are_near_least_squares():
    gram = moment_of(16).double()
    matrix = MATRIX.double()
    zero = Product(torch.zeros(20, 1, dtype=torch.float64), torch.zeros(1, 16, dtype=torch.float64))
    _, sparse = alternate_in_metric(matrix, gram, zero, lambda _, part: part, count=120, rounds=50)
    exact = torch.zeros_like(sparse)
    for row, support in enumerate(sparse != 0):
        places = support.nonzero()[:, 0]
        if len(places):
            exact[row, places] = torch.linalg.solve(gram[places][:, places], (matrix @ gram)[row, places])
    best, pruned = output_error(matrix - exact, gram), output_error(matrix - keep_largest(matrix, 120), gram)
    found = output_error(matrix - sparse, gram)
    assert found - best <= 0.1 * (pruned - best)


@pytest.mark.parametrize(
    "gram",
    [
        torch.ones(3),
        torch.ones(16, 3),
        torch.eye(3),
        torch.ones(0, 0),
        torch.zeros(16),
        -torch.ones(16),
        torch.full((16, 16), math.nan),
    ],
    ids=["short", "not square", "no divisor", "empty", "zero", "negative", "nan"],
)
def test_what_is_no_second_moment_is_refused(gram):
    with pytest.raises(NumericalError, match="second moment"):
        require_moment(gram, 16)


def test_inputs_that_are_always_zero_are_no_trouble():
    gram = moment_of(16)
    gram[:, 3] = gram[3] = 0
    left, values, right = truncated_svd(MATRIX, 3)
    root = root_of(gram)
    part, sparse = alternate_in_metric(
        MATRIX,
        gram,
        Product(left, values[:, None] * right),
        lambda target, _: low_rank_in_metric(target, 3, root),
        count=50,
        rounds=10,
    )
    assert part.right.isfinite().all()
    assert sparse.isfinite().all()


@pytest.mark.parametrize("samples", [500, 7])  # of seven inputs the moment is singular
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refitted_values_are_as_good_as_least_squares(samples, dtype):
    gram = moment_of(16, samples=samples, dtype=torch.float64)
    pruned = keep_largest(MATRIX, 100).double()
    found = refit_on_support(MATRIX.to(dtype), pruned.to(dtype), gram.to(dtype)).double()
    assert bool((found[pruned == 0] == 0).all())
    exact, root = torch.zeros_like(pruned), root_of(gram)
    for row, support in enumerate(pruned != 0):
        wanted = (MATRIX.double()[row] @ root)[:, None]
        exact[row, support] = torch.linalg.lstsq(root[support].T, wanted, driver="gelsd").solution[:, 0]
    before = output_error(MATRIX - pruned, gram)
    best = output_error(MATRIX - exact, gram)
    assert output_error(MATRIX - found, gram) == pytest.approx(best, rel=1e-3, abs=1e-3 * before)


def test_a_moved_support_is_better_than_a_refitted_one():
    gram = moment_of(16)
    kept = torch.where(keep_largest(MATRIX * gram.diagonal().sqrt(), 100) != 0, MATRIX, 0)
    found = sparse_in_metric(MATRIX, gram, lambda values: keep_largest(values, 100))
    assert int((found != 0).sum()) <= 100
    assert output_error(MATRIX - found, gram) < output_error(MATRIX - refit_on_support(MATRIX, kept, gram), gram)


@pytest.mark.parametrize("shape", [(20, 16), (10, 16)])
def test_both_ways_to_the_best_low_rank_part_agree(shape):
    gram = moment_of(16).double()
    matrix = MATRIX[: shape[0]].double()
    one, other = best_in_metric(matrix, 3, gram), low_rank_in_metric(matrix, 3, root_of(gram))
    torch.testing.assert_close(one.left @ one.right, other.left @ other.right, rtol=1e-5, atol=1e-6)
