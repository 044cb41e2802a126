"""Products of sparse matrices: transforms whose factors are known, laws, and pyfaust where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import dft, hadamard

from tcompress.errors import NumericalError
from tcompress.linalg.palm import hierarchical, palm4msa, product, sparse_product
from tcompress.linalg.sparse_sets import (
    LargestEntries,
    LargestPerRowAndColumn,
    Level,
    butterfly_levels,
    dft_levels,
    full_nonzeros,
    hadamard_levels,
    rectangular_levels,
    sparse_product_nonzeros,
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Matrices as small as these only wait for threads: ten times as long where another process keeps a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def walsh(d):
    return torch.from_numpy(hadamard(d).astype(np.float64))


def error(matrix, scale, factors):
    return float(torch.linalg.vector_norm(matrix - scale * product(factors)) / torch.linalg.vector_norm(matrix))


def nonzeros(factors):
    return [int((factor != 0).sum()) for factor in factors]


@pytest.mark.parametrize("d", [4, 8, 16, 32, 64])
def test_the_fast_walsh_hadamard_transform_is_found(d):
    scale, factors = hierarchical(walsh(d), hadamard_levels(d))
    assert nonzeros(factors) == [2 * d] * (d.bit_length() - 1)
    assert error(walsh(d), scale, factors) < 1e-12


@pytest.mark.parametrize("d", [8, 32, 64])
def test_butterfly_supports_give_the_walsh_hadamard_transform(d):
    scale, factors = hierarchical(walsh(d), butterfly_levels(d), iterations=8)
    assert nonzeros(factors) == [2 * d] * (d.bit_length() - 1)
    assert error(walsh(d), scale, factors) < 1e-12


@pytest.mark.parametrize("d", [8, 32])
def test_butterfly_supports_and_a_bit_reversal_give_the_fourier_transform(d):
    scale, factors = hierarchical(torch.from_numpy(dft(d)), dft_levels(d), iterations=8)
    assert nonzeros(factors) == [2 * d] * (d.bit_length() - 1) + [d]
    assert error(torch.from_numpy(dft(d)), scale, factors) < 1e-12


def test_sparse_product_finds_the_transform_without_being_told():
    scale, factors = sparse_product(walsh(32), 2)
    assert nonzeros(factors) == [64] * 5
    assert error(walsh(32), scale, factors) < 1e-12


def test_planted_complex_butterflies_are_found():
    supports = [level.factor for level in butterfly_levels(16)] + [butterfly_levels(16)[-1].residual]
    phases = [torch.polar(torch.ones(16, 16).double(), gaussian(16, 16, seed=j)) for j in range(4)]
    matrix = product([support(phase) for support, phase in zip(supports, phases, strict=True)])
    assert error(matrix, *hierarchical(matrix, butterfly_levels(16), iterations=8)) < 1e-12


def test_complex_matrices_are_fitted_with_conjugate_transposes():
    levels = [Level(LargestPerRowAndColumn(4, 4), LargestPerRowAndColumn(k, k), 16) for k in (8, 6)]
    matrix = torch.complex(gaussian(16, 16), gaussian(16, 16, seed=1))
    assert error(matrix, *hierarchical(matrix, levels)) < 0.2  # plain transposes end at 0.37


def test_planted_butterflies_are_found_and_without_their_supports_come_nearer_than_the_largest_entries():
    supports = [level.factor for level in butterfly_levels(32)] + [butterfly_levels(32)[-1].residual]
    matrix = product([support(gaussian(32, 32, seed=j).sign()) for j, support in enumerate(supports)])
    assert error(matrix, *hierarchical(matrix, butterfly_levels(32))) < 1e-12
    scale, factors = sparse_product(matrix, 2, 5)
    kept = LargestEntries(sum(nonzeros(factors)))(matrix)
    largest = error(matrix, float((kept * matrix).sum()), [kept])
    assert error(matrix, scale, factors) < 0.3 * largest


def test_a_random_tall_matrix_with_five_per_row_and_column():
    matrix = gaussian(500, 32)
    assert error(matrix, *sparse_product(matrix, 5, 1)) == pytest.approx(0.623, abs=0.001)
    assert error(matrix, *sparse_product(matrix, 5, 4)) < 0.58


SIZES = [(12, 12), (12, 40), (40, 12), (3, 50), (1, 9), (9, 1), (1, 1)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("count", [1, 2, 4, None])
def test_factors_fit_keep_to_their_bound_and_never_enlarge_the_error(shape, count):
    matrix = gaussian(*shape)
    before = matrix.clone()
    for s in (1, 2, 5):
        scale, factors = sparse_product(matrix, s, count)
        planned = sparse_product_nonzeros(*shape, s, len(factors))
        assert [tuple(factor.shape) for factor in factors] == [size for size, _ in planned]
        assert all(found <= most for found, (_, most) in zip(nonzeros(factors), planned, strict=True))
        assert error(matrix, scale, factors) <= error(matrix, *sparse_product(matrix, s, 1)) + 1e-12
        assert error(matrix, scale, factors) <= 1
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("shape", SIZES)
def test_from_full_nonzeros_on_the_product_is_exact(shape):
    matrix = gaussian(*shape)
    for s in (full_nonzeros(*shape), 10 * full_nonzeros(*shape)):
        assert error(matrix, *sparse_product(matrix, s, 3)) < 1e-14


def test_identities_and_permutations_are_exact_with_one_per_row_and_column():
    identity = torch.eye(20, dtype=torch.float64)
    for matrix in (identity, identity[torch.randperm(20, generator=torch.Generator().manual_seed(0))]):
        for count in (1, 3, None):
            scale, factors = sparse_product(matrix, 1, count)
            assert error(matrix, scale, factors) < 1e-14
            assert nonzeros(factors) == [20] * len(factors)


def test_the_largest_entries_are_the_last_resort():
    matrix = torch.eye(16, dtype=torch.float64) + 0.01 * gaussian(16, 16)
    for iterations in (0, 1):
        hasty = sparse_product(matrix, 1, 4, iterations=iterations)
        assert error(matrix, *hasty) <= error(matrix, *sparse_product(matrix, 1, 1)) + 1e-15


def test_the_same_matrix_gives_the_same_bits():
    first, second = (sparse_product(gaussian(24, 60), 3) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(one, other) for one, other in zip(first[1], second[1], strict=True))


def test_a_power_of_two_only_changes_the_scale():
    matrix = gaussian(16, 24).float()
    scale, factors = sparse_product(matrix, 3, 3)
    for exponent in (-900, -120, 60, 900):
        other_scale, others = sparse_product(matrix.double() * 2.0**exponent, 3, 3)
        assert other_scale == scale * 2.0**exponent
        assert all(torch.equal(one, other) for one, other in zip(factors, others, strict=True))


def test_a_zero_matrix_has_scale_zero_and_finite_factors():
    for s in (2, 9):
        scale, factors = sparse_product(torch.zeros(6, 9), s, 3)
        assert scale == 0
        assert all(bool(factor.isfinite().all()) for factor in factors)
        assert product(factors).shape == (6, 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    matrix = torch.ones(4, 4)
    matrix[1, 2] = value
    with pytest.raises(NumericalError, match="the weight holds NaN or infinite values"):
        sparse_product(matrix, 2)


def test_a_scale_beyond_the_range_is_refused():
    with pytest.raises(NumericalError, match="exceeds the range of float64"):
        sparse_product(torch.full((8, 8), 1.7e308, dtype=torch.float64), 2)


def test_more_sweeps_never_raise_the_error_and_a_good_start_is_kept():
    matrix, sets = gaussian(16, 30), [LargestPerRowAndColumn(3, 3), LargestPerRowAndColumn(6, 3)]
    start = [torch.eye(16, dtype=torch.float64), torch.zeros(16, 30, dtype=torch.float64)]
    fits = [palm4msa(matrix, start, sets, iterations=iterations, tolerance=0) for iterations in (0, 1, 2, 5, 20, 60)]
    errors = [error(matrix, *fit) for fit in fits]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == 1
    again = palm4msa(matrix, fits[-1][1], sets, iterations=3)
    assert error(matrix, *again) <= errors[-1] + 1e-12


def test_a_factor_on_which_the_product_does_not_depend_is_left_as_it_is():
    nothing, identity = torch.zeros(4, 4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    apart = [lambda matrix: matrix * 0, LargestEntries(4)]
    scale, factors = palm4msa(walsh(4), [nothing, identity], apart, iterations=5)
    assert error(walsh(4), scale, factors) == 1
    assert all(bool(factor.isfinite().all()) for factor in factors)


def test_residuals_on_the_left_fit_a_wide_matrix():
    matrix = gaussian(16, 100)
    scale, factors = hierarchical(matrix, rectangular_levels(16, 4, 4, 4), residual_on_right=False)
    assert [tuple(factor.shape) for factor in factors] == [(16, 16)] * 3 + [(16, 100)]
    assert nonzeros(factors)[1:] == [64, 64, 400]
    assert error(matrix, scale, factors) < 0.6


@pytest.mark.filterwarnings("ignore")  # pyfaust's own: packages it could use
@pytest.mark.parametrize(("rows", "columns", "count", "s"), [(32, 32, 5, 3), (32, 96, 3, 4), (48, 48, 2, 6)])
def test_the_error_is_at_most_that_of_pyfaust_at_the_same_constraints(rows, columns, count, s):
    parameters, fact = pytest.importorskip("pyfaust.factparams"), pytest.importorskip("pyfaust.fact")
    matrix, residuals = gaussian(rows, columns), [max(s, rows >> (k + 1)) for k in range(count - 1)]
    constraints = [
        [parameters.ConstraintInt("splincol", rows, rows, s) for _ in residuals],
        [parameters.ConstraintInt("splincol", rows, columns, residual) for residual in residuals],
    ]
    stops = [parameters.StoppingCriterion(30) for _ in range(2)]
    theirs = fact.hierarchical(
        matrix.numpy(), parameters.ParamsHierarchical(*constraints, *stops, is_update_way_R2L=True), backend=2020
    )
    levels = [Level(LargestPerRowAndColumn(s, s), LargestPerRowAndColumn(k, k), rows) for k in residuals]
    scale, factors = hierarchical(matrix, levels, iterations=30)
    assert error(matrix, scale, factors) <= error(matrix, 1, [torch.from_numpy(theirs.toarray())])
