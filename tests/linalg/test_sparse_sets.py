"""Projections on sets of sparse matrices against loops, and the lists of sets."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tcompress.linalg.sparse_sets import (
    FixedSupport,
    LargestEntries,
    LargestPerColumn,
    LargestPerRowAndColumn,
    butterfly_levels,
    default_count,
    dft_levels,
    full_nonzeros,
    hadamard_levels,
    rectangular_levels,
    sparse_product_levels,
    sparse_product_nonzeros,
)

SHAPES = [(4, 4), (1, 7), (7, 1), (5, 12), (12, 5), (32, 64)]


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def support_by_a_loop(matrix, per_row, per_column):
    magnitude = matrix.abs().numpy()
    kept = np.zeros(magnitude.shape, dtype=bool)
    for row in range(magnitude.shape[0]):
        kept[row, np.argsort(-magnitude[row], kind="stable")[:per_row]] = True
    for column in range(magnitude.shape[1]):
        kept[np.argsort(-magnitude[:, column], kind="stable")[:per_column], column] = True
    return torch.from_numpy(kept)


@pytest.mark.parametrize("total", [4, 5, 8, 11, 16])
@pytest.mark.parametrize("seed", range(3))
def test_of_sixteen_integers_every_row_and_column_keeps_its_largest(total, seed):
    matrix = torch.randperm(16, generator=torch.Generator().manual_seed(seed)).reshape(4, 4).double() + 1
    projected = LargestPerRowAndColumn.of_total(total, 4, 4)(matrix)
    kept = projected != 0
    for lines, lines_kept in ((matrix, kept), (matrix.T, kept.T)):
        for line, line_kept in zip(lines, lines_kept, strict=True):
            chosen = line.topk(total // 4).indices
            assert len(chosen) >= 1
            assert line_kept[chosen].all()
    assert 4 * (total // 4) <= int(kept.sum()) <= 2 * total
    assert torch.allclose(projected * torch.linalg.vector_norm(matrix[kept]), torch.where(kept, matrix, 0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("per_row", "per_column"), [(0, 1), (1, 0), (1, 1), (2, 3), (4, 2), (100, 0), (3, 100)])
def test_rows_and_columns_choose_what_a_loop_chooses(shape, per_row, per_column):
    for matrix in (gaussian(*shape), gaussian(*shape).mul(2).round()):  # the second is full of ties
        projected = LargestPerRowAndColumn(per_row, per_column)(matrix)
        kept = support_by_a_loop(matrix, per_row, per_column)
        expected = torch.where(kept, matrix, 0)
        assert torch.allclose(projected, expected / max(1e-300, float(torch.linalg.vector_norm(expected))))
        assert int((projected != 0).sum()) <= LargestPerRowAndColumn(per_row, per_column).most_nonzeros(*shape)


def test_equal_magnitudes_are_decided_by_the_index_not_by_rounding_errors():
    signs = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64)
    noisy = signs * (1 + 1e-13 * gaussian(4, 4))
    projected = LargestPerRowAndColumn(1, 1)(noisy)
    assert torch.equal(projected != 0, support_by_a_loop(signs, 1, 1))
    assert torch.equal(LargestEntries(5)(noisy).reshape(-1) != 0, torch.arange(16) < 5)


def test_the_scale_of_the_matrix_does_not_matter():
    matrix, kept = gaussian(9, 6), LargestPerRowAndColumn(2, 2)
    for exponent in (-600, 400):
        assert torch.equal(kept(matrix * 2.0**exponent) != 0, kept(matrix) != 0)


def test_entries_per_column_and_in_all_are_counted():
    matrix = gaussian(9, 6)
    assert torch.equal((LargestPerColumn(4)(matrix) != 0).sum(dim=0), torch.full((6,), 4))
    largest = LargestEntries(20)(matrix)
    assert int((largest != 0).sum()) == 20
    assert matrix[largest != 0].abs().min() >= matrix[largest == 0].abs().max()


def test_a_fixed_support_is_kept_whatever_the_values():
    support = gaussian(5, 5) > 0
    assert torch.equal(FixedSupport(support)(gaussian(5, 5, seed=1)) != 0, support)


@pytest.mark.parametrize("project", [LargestPerRowAndColumn(2, 1), LargestPerColumn(2), LargestEntries(7)])
def test_projections_have_norm_one_and_leave_their_argument_alone(project):
    for matrix in (gaussian(6, 8), torch.complex(gaussian(6, 8), gaussian(6, 8, seed=1))):
        before = matrix.clone()
        projected = project(matrix)
        assert float(torch.linalg.vector_norm(projected)) == pytest.approx(1)
        assert torch.allclose(project(projected), projected)
        assert torch.equal(matrix, before)
    assert not project(torch.zeros(6, 8, dtype=torch.float64)).any()


def test_residuals_are_halved_down_to_what_the_last_factor_keeps():
    levels = sparse_product_levels(64, 16, nonzeros=2, count=6)
    assert [level.residual.per_column for level in levels] == [8, 4, 2, 2, 2]
    assert [level.residual.per_row for level in levels] == [32, 16, 8, 8, 8]
    assert {level.factor for level in levels} == {LargestPerRowAndColumn(2, 2)}
    assert [level.residual.per_column for level in sparse_product_levels(16, 64, nonzeros=2, count=2)] == [2]
    assert sparse_product_levels(16, 64, nonzeros=2, count=1) == []


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16), (1, 9), (9, 1)])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_planned_nonzeros_grow_to_full_factors_and_shapes_fit_together(shape, count):
    full = full_nonzeros(*shape)
    planned = [sparse_product_nonzeros(*shape, nonzeros, count) for nonzeros in range(1, full + 3)]
    totals = [sum(most for _, most in factors) for factors in planned]
    assert totals == sorted(totals)
    for factors in planned:
        shapes = [shape for shape, _ in factors]
        assert (len(factors), shapes[0][0], shapes[-1][1]) == (count, *shape)
        assert all(left[1] == right[0] for left, right in pairwise(shapes))
    assert all(most == math.prod(shape) for shape, most in planned[full - 1])


def test_there_are_as_many_factors_as_halvings_of_the_larger_size():
    assert [default_count(*shape) for shape in ((1, 1), (1, 2), (64, 576), (2304, 256), (3, 1024))] == [1, 1, 9, 11, 10]


def test_named_lists_have_their_published_sizes():
    assert [level.residual.per_row for level in hadamard_levels(32)] == [16, 8, 4, 2]
    assert [int(level.factor.support.sum()) for level in butterfly_levels(16)] == [32, 32, 32]
    assert [int(level.residual.support.sum()) for level in dft_levels(8)] == [32, 16, 8]
    assert dft_levels(8)[-1].residual.support.nonzero()[:, 1].tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    levels = rectangular_levels(10, 4, per_column=3, nonzeros=2)
    assert [level.residual.count for level in levels] == [140, 112, 90]
    assert [level.factor for level in levels] == [LargestPerColumn(3), LargestEntries(20), LargestEntries(20)]
