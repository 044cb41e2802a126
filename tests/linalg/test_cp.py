"""The canonical polyadic decomposition: tensors of known rank, degenerate ones, and tensorly's ALS as the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.cp import (
    NORM_LIMIT,
    congruence,
    cp_als,
    cp_reconstruct,
    cp_sweeps,
    is_degenerate,
    limit_norms,
)

SHAPES = [
    (7, 9),
    (6, 8, 7),
    (5, 4, 3, 6),
    (3, 4, 2, 3, 4),
    (3, 2, 3, 2, 3, 2, 3),
    (1, 6, 5, 4),
    (6, 1, 5),
    (5, 4, 6, 1),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def of_rank(rank: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor]]:
    factors = [gaussian(n, rank, seed=seed + 10 * k, dtype=dtype) for k, n in enumerate(shape)]
    return cp_reconstruct(torch.ones(rank, dtype=dtype), factors), factors


def matrix_product(n: int) -> Tensor:
    """The tensor of multiplying two n x n matrices: of rank 7 for n = 2 (Strassen)."""
    delta = torch.eye(n, dtype=torch.float64)
    return torch.einsum("ab,cd,ef->afcbed", delta, delta, delta).reshape(n * n, n * n, n * n)


def w_state() -> Tensor:
    """Of rank 3, but tensors of rank 2 come as near to it as one likes, with diverging components."""
    tensor = torch.zeros(2, 2, 2, dtype=torch.float64)
    tensor[0, 0, 1] = tensor[0, 1, 0] = tensor[1, 0, 0] = 1
    return tensor


def diverged_w_state(epsilon: float) -> tuple[Tensor, list[Tensor]]:
    """((e1 + epsilon e2)^3 - e1^3) / epsilon: error epsilon, squared norms of 2 / epsilon^2."""
    first = torch.tensor([[1.0, 1.0], [epsilon, 0.0]], dtype=torch.float64)
    norm = math.hypot(1, epsilon)
    unit = first / torch.tensor([norm, 1.0], dtype=torch.float64)
    last = unit * torch.tensor([1.0, -1.0], dtype=torch.float64)
    return torch.tensor([norm**3, 1.0], dtype=torch.float64) / epsilon, [unit, unit.clone(), last]


def relative_error(tensor: Tensor, weights: Tensor, factors: list[Tensor]) -> float:
    found = cp_reconstruct(weights.double(), [factor.double() for factor in factors])
    return float(torch.linalg.vector_norm(tensor.double() - found) / torch.linalg.vector_norm(tensor.double()))


def square_norms(tensor: Tensor, weights: Tensor) -> float:
    return float(weights.double().square().sum() / tensor.double().square().sum())


def assert_well_formed(tensor: Tensor, rank: int, weights: Tensor, factors: list[Tensor]) -> None:
    assert weights.shape == (rank,)
    assert (weights >= 0).all()
    assert (weights[1:] <= weights[:-1]).all()
    assert [factor.shape for factor in factors] == [(n, rank) for n in tensor.shape]
    signed = max(k for k, n in enumerate(tensor.shape) if n > 1)
    for k, factor in enumerate(factors):
        assert factor.dtype == weights.dtype == tensor.dtype
        torch.testing.assert_close(torch.linalg.vector_norm(factor, dim=0), factor.new_ones(rank))
        if k != signed:
            assert (factor.gather(0, factor.abs().argmax(dim=0, keepdim=True)) > 0).all()


def assert_same_bits(first: tuple[Tensor, list[Tensor]], second: tuple[Tensor, list[Tensor]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip([first[0], *first[1]], [second[0], *second[1]], strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_strassens_seven_products_are_found(seed: int):
    tensor = matrix_product(2)
    weights, factors = cp_als(tensor, 7, seed=seed, starts=10, sweeps=1000, tolerance=1e-9)
    assert relative_error(tensor, weights, factors) < 1e-8
    assert square_norms(tensor, weights) <= NORM_LIMIT


def test_six_products_do_not_multiply_matrices():
    tensor = matrix_product(2)
    assert relative_error(tensor, *cp_als(tensor, 6, starts=8, sweeps=400)) > 0.1


@pytest.mark.parametrize("shape", [(6, 7, 8), (12, 5, 4), (5, 4, 4, 3)])
def test_components_below_kruskals_bound_are_recovered(shape: tuple[int, ...]):
    tensor, true = of_rank(4, *shape)
    weights, factors = cp_als(tensor, 4, sweeps=2000, tolerance=1e-10)
    assert relative_error(tensor, weights, factors) < 1e-6
    for found, wanted in zip(factors, true, strict=True):
        cosines = (found.T @ (wanted / torch.linalg.vector_norm(wanted, dim=0))).abs()
        assert (cosines.max(dim=0).values > 0.999).all()


def test_plain_sweeps_of_the_w_state_degenerate_and_bounded_ones_do_not():
    tensor = w_state()
    plain, factors, errors = cp_sweeps(tensor, [gaussian(2, 2, seed=k) for k in range(3)], 3000)
    assert errors[-1] < 0.006
    assert square_norms(tensor, plain) > NORM_LIMIT
    assert is_degenerate(plain, factors)
    assert float(congruence(factors)[0, 1]) < -0.9

    weights, factors = cp_als(tensor, 2, sweeps=1000)
    assert square_norms(tensor, weights) <= NORM_LIMIT * (1 + 1e-9)
    assert not is_degenerate(weights, factors)
    assert relative_error(tensor, weights, factors) < 0.011


@pytest.mark.parametrize("epsilon", [0.1, 0.02])
def test_the_correction_shortens_diverged_components_at_no_larger_an_error(epsilon: float):
    tensor, (weights, factors) = w_state(), diverged_w_state(epsilon)
    assert is_degenerate(weights, factors)
    error = relative_error(tensor, weights, factors)
    assert error == pytest.approx(epsilon, rel=1e-2)
    shorter, corrected = limit_norms(tensor, weights, factors, sweeps=400)
    assert relative_error(tensor, shorter, corrected) <= error * (1 + 1e-6)
    d2 = math.sqrt(3) * error  # ((e1 + d e2)^3 - (e1 - d e2)^3) / 2 d, the symmetric way, has the error d^2 / sqrt(3)
    assert square_norms(tensor, shorter) < 1.02 * (1 + d2) ** 3 / (6 * d2)
    assert square_norms(tensor, weights) > 10 * square_norms(tensor, shorter)
    assert not is_degenerate(shorter, corrected)


def test_the_correction_works_in_float32_as_well():
    tensor, (weights, factors) = w_state().float(), diverged_w_state(0.02)
    shorter, corrected = limit_norms(tensor, weights.float(), [factor.float() for factor in factors], sweeps=400)
    assert shorter.dtype == corrected[0].dtype == torch.float32
    assert square_norms(tensor, weights) > 10 * square_norms(tensor, shorter)
    assert relative_error(tensor, shorter, corrected) <= 0.02 * (1 + 1e-3)


def test_the_correction_may_be_allowed_a_larger_error():
    tensor, (weights, factors) = w_state(), diverged_w_state(0.02)
    same = limit_norms(tensor, weights, factors)
    looser = limit_norms(tensor, weights, factors, error=0.1)
    assert square_norms(tensor, looser[0]) < 0.5 * square_norms(tensor, same[0])
    assert 0.099 < relative_error(tensor, *looser) <= 0.1 * (1 + 1e-6)


def test_the_correction_never_lengthens_what_is_short_already():
    tensor = gaussian(8, 9, 7)
    weights, factors = cp_als(tensor, 5)
    shorter, corrected = limit_norms(tensor, weights, factors)
    assert square_norms(tensor, shorter) <= square_norms(tensor, weights) * (1 + 1e-6)
    assert relative_error(tensor, shorter, corrected) <= relative_error(tensor, weights, factors) * (1 + 2e-6)


def test_healthy_components_are_not_called_degenerate():
    assert not is_degenerate(*cp_als(gaussian(8, 9, 7), 5))
    assert not is_degenerate(torch.zeros(2), [torch.eye(2)] * 3)


def test_rank_three_is_fitted_with_four_components_in_seventy_sweeps():
    tensor, _ = of_rank(3, 6, 8, 7, seed=5)
    initial = [torch.rand(n, 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in tensor.shape]
    weights, factors, errors = cp_sweeps(tensor, initial, 70)
    assert relative_error(tensor, *cp_als(tensor, 4, sweeps=70)) < 0.01
    assert errors[-1] < 0.01
    assert errors[-1] == pytest.approx(relative_error(tensor, weights, factors), rel=1e-6)
    assert all(late <= early + 1e-12 for early, late in pairwise(errors))


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_sweep_raises_the_error(shape: tuple[int, ...], dtype: torch.dtype):
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    errors = cp_sweeps(gaussian(*shape, dtype=dtype), [gaussian(n, 3, seed=n) for n in shape], 40)[2]
    assert all(late <= early + rounding for early, late in pairwise(errors))
    assert errors[0] <= 1


@pytest.mark.parametrize(
    ("shape", "rank"), [((24, 20, 9), 4), ((24, 20, 9), 16), ((12, 10, 3, 3), 8), ((4, 5, 6, 3, 4), 6)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_after_the_same_sweeps_is_that_of_tensorly(shape: tuple[int, ...], rank: int, dtype: torch.dtype):
    import numpy as np  # noqa: PLC0415
    from tensorly.decomposition import parafac  # noqa: PLC0415

    tensor = gaussian(*shape, dtype=dtype) + 3 * of_rank(5, *shape, dtype=dtype)[0]
    initial = [gaussian(n, rank, seed=n, dtype=torch.float64) for n in shape]
    _, oracle = parafac(
        tensor.double().numpy(),
        rank,
        n_iter_max=30,
        init=(np.ones(rank), [factor.numpy().copy() for factor in initial]),
        tol=1e-30,
        return_errors=True,
    )
    weights, factors, errors = cp_sweeps(tensor, initial, len(oracle))
    assert errors == pytest.approx([float(error) for error in oracle], rel=1e-2)
    assert relative_error(tensor, weights, factors) <= 1.01 * float(oracle[-1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_order_is_approximated_in_the_promised_form(shape: tuple[int, ...], rank: int, dtype: torch.dtype):
    tensor = of_rank(3, *shape, dtype=dtype)[0]
    weights, factors = cp_als(tensor, rank, sweeps=100)
    assert_well_formed(tensor, rank, weights, factors)
    assert relative_error(tensor, weights, factors) < (1 if rank == 1 else 0.3)


def test_a_matrix_gets_its_best_approximation():
    matrix = gaussian(30, 20)
    best = float(torch.linalg.norm(torch.linalg.svdvals(matrix.double())[5:]) / torch.linalg.norm(matrix.double()))
    weights, factors = cp_als(matrix, 5)
    assert relative_error(matrix, weights, factors) == pytest.approx(best, rel=1e-5)
    assert all(torch.dist(factor.T @ factor, torch.eye(5)) < 1e-5 for factor in factors)  # the singular vectors
    assert relative_error(matrix[:, None], *cp_als(matrix[:, None], 5)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("shape", [(3, 4, 2), (4, 3), (3, 4), (2, 2, 2, 2), (1, 1, 1), (1, 5), (1, 1), (2, 1, 6)])
@pytest.mark.parametrize("excess", [0, 1, 7])
def test_the_rank_that_every_tensor_has_gives_it_exactly(shape: tuple[int, ...], excess: int):
    tensor, rank = gaussian(*shape), math.prod(shape) // max(shape) + excess
    weights, factors = cp_als(tensor, rank)
    assert weights.shape == (rank,)
    assert all(factor.shape == (n, rank) for n, factor in zip(shape, factors, strict=True))
    assert all(factor.isfinite().all() for factor in factors)
    assert relative_error(tensor, weights, factors) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5)])
def test_a_zero_tensor_has_zero_weights_and_unit_columns(shape: tuple[int, ...], rank: int):
    weights, factors = cp_als(torch.zeros(shape), rank)
    assert_well_formed(torch.zeros(shape), rank, weights, factors)
    assert (weights == 0).all()


def test_one_start_is_swept_until_it_settles():
    tensor = of_rank(3, 9, 8, 7)[0]
    assert relative_error(tensor, *cp_als(tensor, 3, starts=1, sweeps=500, tolerance=1e-8)) < 1e-3


def test_a_small_error_of_a_float32_tensor_is_measured_and_lowered():
    tensor = of_rank(3, 9, 8, 7, dtype=torch.float32)[0]
    assert relative_error(tensor, *cp_als(tensor, 3, sweeps=500)) < 1e-6


def test_more_starts_do_not_raise_the_error_where_one_is_stuck():
    tensor = matrix_product(2)
    one, many = (relative_error(tensor, *cp_als(tensor, 7, starts=n, sweeps=300, tolerance=1e-9)) for n in (1, 12))
    assert many <= one


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**-40, 2.0**40, 2.0**118])
def test_the_scale_of_the_tensor_is_that_of_the_weights(factor: float):
    tensor = gaussian(6, 8, 7) / 8
    weights, factors = cp_als(tensor, 4)
    scaled_weights, scaled_factors = cp_als(tensor * factor, 4)
    torch.testing.assert_close(scaled_weights / factor, weights, rtol=1e-3, atol=0)
    for found, expected in zip(scaled_factors, factors, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("factor", [1e-36, 1e36])
def test_the_ends_of_the_range_of_float32_neither_overflow_nor_vanish(factor: float):
    tensor = gaussian(6, 8, 7)
    expected = relative_error(tensor, *cp_als(tensor, 4))
    assert relative_error(tensor * factor, *cp_als(tensor * factor, 4)) == pytest.approx(expected, rel=1e-2)


def test_the_correction_knows_the_scale_as_well():
    tensor, (weights, factors) = w_state(), diverged_w_state(0.1)
    expected = limit_norms(tensor, weights, factors)[0]
    torch.testing.assert_close(limit_norms(tensor * 2.0**300, weights * 2.0**300, factors)[0] / 2.0**300, expected)


def test_the_same_tensor_and_seed_give_the_same_bits():
    tensor = gaussian(12, 10, 8)
    torch.manual_seed(1)
    first = cp_als(tensor, 6, seed=7, sweeps=20)
    torch.manual_seed(2)
    assert_same_bits(cp_als(tensor.clone(), 6, seed=7, sweeps=20), first)
    assert not torch.equal(cp_als(tensor, 6, seed=8, sweeps=20)[0], first[0])


def test_the_global_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    cp_als(gaussian(6, 8, 7), 4)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("factor", [1.0, 2.0**60])
@pytest.mark.parametrize(("shape", "rank"), [((6, 8, 7), 4), ((6, 8), 3), ((2, 3, 4), 6)])
def test_the_input_is_not_modified(shape: tuple[int, ...], rank: int, factor: float):
    tensor, initial = gaussian(*shape) * factor, [gaussian(n, rank) for n in shape]
    before, initial_before = tensor.clone(), [start.clone() for start in initial]
    weights, factors = cp_als(tensor, rank)
    kept = [part.clone() for part in (weights, *factors)]
    cp_sweeps(tensor, initial, 3)
    limit_norms(tensor, weights, factors)
    assert torch.equal(tensor, before)
    assert all(torch.equal(a, b) for a, b in zip(initial, initial_before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((weights, *factors), kept, strict=True))


def test_a_tensor_that_is_not_contiguous_is_read_right():
    tensor = gaussian(8, 6, 7).permute(2, 0, 1)
    assert_same_bits(cp_als(tensor, 4), cp_als(tensor.contiguous(), 4))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [2, 100])
def test_nan_and_infinity_are_refused(bad: float, rank: int):
    tensor = gaussian(4, 5, 6)
    tensor[1, 2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinite"):
        cp_als(tensor, rank)


def test_weights_beyond_the_dtype_are_refused():
    with pytest.raises(NumericalError, match="exceeds the range"):
        cp_als(torch.full((8, 8, 8), 3e38), 2)
