"""The truncated SVD against the best error that Eckart and Young allow, taken from a float64 decomposition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.svd import ABSOLUTE_EXCESS, RELATIVE_EXCESS, rank_for_error, singular_values, truncated_svd


def spectrum(kind: str, n: int) -> Tensor:
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "power 0.2": i**-0.2,
        "power 0.5": i**-0.5,
        "power 1": 1 / i,
        "power 2": i**-2,
        "exponential": torch.exp(-i / 20),
        "flat": torch.ones(n, dtype=torch.float64),
        "linear": 1 - (i - 1) / n,
        "step": torch.where(i <= 10, 1.0, 0.05),
        "slow ramp, then a gap": torch.where(i <= n // 5, 1 - 1.5 * i / n, 0.1),
        "one dominant": torch.where(i <= 1, 100.0, 1.0) * i**-0.3,
        "low rank and noise": torch.where(i <= 20, 1 / i, 0.0) + 1e-4,
    }[kind]


KINDS = [
    "power 0.2", "power 0.5", "power 1", "power 2", "exponential", "flat", "linear", "step", "slow ramp, then a gap",
    "one dominant", "low rank and noise",
]  # fmt: skip


def with_spectrum(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    k = values.numel()
    left = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, k, generator=g, dtype=torch.float64)).Q
    return ((left * values) @ right.T).float()


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def error_of(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> float:
    return float(torch.linalg.norm(matrix.double() - (left.double() * values.double()) @ right.double()))


def assert_as_good_as_promised(matrix: Tensor, rank: int, seed: int = 0) -> None:
    left, values, right = truncated_svd(matrix, rank, seed=seed)
    best = float(torch.linalg.norm(torch.linalg.svdvals(matrix.double())[rank:]))
    allowed = (1 + RELATIVE_EXCESS) * best + ABSOLUTE_EXCESS * float(torch.linalg.norm(matrix.double()))
    assert error_of(matrix, left, values, right) <= allowed


def assert_well_formed(matrix: Tensor, left: Tensor, values: Tensor, right: Tensor) -> None:
    r = values.numel()
    assert left.shape == (matrix.shape[0], r)
    assert right.shape == (r, matrix.shape[1])
    assert left.dtype == values.dtype == right.dtype == matrix.dtype
    identity = torch.eye(r, dtype=torch.float64)
    torch.testing.assert_close(left.double().T @ left.double(), identity, rtol=0, atol=2e-6)
    torch.testing.assert_close(right.double() @ right.double().T, identity, rtol=0, atol=2e-6)
    assert (values >= 0).all()
    assert (values[1:] <= values[:-1]).all()
    assert (left.gather(0, left.abs().argmax(dim=0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", [1, 8, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_large_matrix_is_within_a_thousandth_of_the_best(kind: str, rank: int):
    matrix = torch.diag(spectrum(kind, 640).float())  # the random start makes a diagonal as hard as any rotation of it
    assert_as_good_as_promised(matrix, rank)


@pytest.mark.parametrize("shape", [(64, 576), (576, 64), (300, 301), (1200, 384), (384, 1200)])
@pytest.mark.parametrize("rank", [1, 8, 64])
def test_the_error_is_within_a_thousandth_of_the_best_for_any_shape(shape: tuple[int, int], rank: int):
    matrix = with_spectrum(spectrum("power 0.5", min(shape)), *shape)
    assert_as_good_as_promised(matrix, rank)
    assert_well_formed(matrix, *truncated_svd(matrix, rank))


@pytest.mark.parametrize("rank", [10, 16, 20, 24])
def test_a_small_matrix_of_fast_decay_is_within_a_thousandth_of_the_best(rank: int):
    values = torch.exp(-torch.arange(60, dtype=torch.float64) / 2)  # beyond rank 16 a float32 Gram matrix is blind
    assert_as_good_as_promised(with_spectrum(values, 80, 60), rank)


@pytest.mark.parametrize("seed", range(4))
def test_no_start_misses_a_direction_hidden_among_flat_ones(seed: int):
    values = torch.ones(600, dtype=torch.float64)
    values[0] = math.sqrt(0.01 * 600)
    assert_as_good_as_promised(with_spectrum(values, 600, 600), 1, seed)


@pytest.mark.parametrize("rank", [2, 30])
def test_a_gaussian_matrix_is_within_a_thousandth_of_the_best(rank: int):
    assert_as_good_as_promised(gaussian(700, 500), rank)


def test_the_leading_values_are_those_of_a_float64_decomposition():
    matrix = with_spectrum(spectrum("power 1", 600), 800, 600)
    torch.testing.assert_close(truncated_svd(matrix, 5)[1], torch.linalg.svdvals(matrix)[:5], rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(20, 30), (700, 700)])
def test_the_same_input_and_seed_give_the_same_bits(shape: tuple[int, int]):
    matrix = gaussian(*shape)
    torch.manual_seed(1)
    first = truncated_svd(matrix, 4, seed=7)
    torch.manual_seed(2)
    second = truncated_svd(matrix.clone(), 4, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_seed_chooses_the_start_of_a_large_matrix():
    matrix = gaussian(700, 700)
    assert not torch.equal(truncated_svd(matrix, 4, seed=1)[0], truncated_svd(matrix, 4, seed=2)[0])


def test_the_global_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    truncated_svd(gaussian(700, 700), 4)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("factor", [1.0, 2.0**60])
def test_the_input_is_not_modified(factor: float):
    matrix = gaussian(600, 600) * factor
    before = matrix.clone()
    truncated_svd(matrix, 3)
    singular_values(matrix)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_a_rank_above_the_dimensions_is_clipped_and_reconstructs_the_matrix(shape: tuple[int, int]):
    matrix = gaussian(*shape)
    left, values, right = truncated_svd(matrix, 100)
    assert values.shape == (min(shape),)
    torch.testing.assert_close((left * values) @ right, matrix)


DEGENERATE = {
    "zero": torch.zeros(12, 8),
    "large zero": torch.zeros(600, 500),
    "constant": torch.full((12, 8), 3.0),
    "large constant": torch.full((600, 700), -0.1),
    "rank 3": gaussian(40, 3) @ gaussian(3, 30),
    "large rank 3": gaussian(600, 3) @ gaussian(3, 700),
    "identity": torch.eye(20),
    "large identity": torch.eye(600),
    "one row": gaussian(1, 50),
    "one column": gaussian(50, 1),
    "one value": torch.tensor([[-2.0]]),
    "one nonzero": torch.diag(torch.tensor([0.0, 1e-3, 0.0])),
    "one row among zeros": torch.cat([torch.zeros(500, 600), gaussian(1, 600)]),
    "graded": torch.diag(10.0 ** -torch.arange(30)),
}


@pytest.mark.parametrize("rank", [1, 5, 8])
@pytest.mark.parametrize("name", DEGENERATE)
def test_vectors_stay_orthonormal_for_degenerate_matrices(name: str, rank: int):
    matrix = DEGENERATE[name]
    assert_well_formed(matrix, *truncated_svd(matrix, rank))
    assert_as_good_as_promised(matrix, min(rank, *matrix.shape))


@pytest.mark.parametrize("size", [20, 600])
@pytest.mark.parametrize("magnitude", [1e36, 1e20, 1e-20, 1e-38, 1e-42])
def test_huge_and_tiny_matrices_decompose_like_any_other(magnitude: float, size: int):
    matrix = torch.diag(spectrum("power 1", size).float()).roll(1, dims=0) * magnitude
    left, values, right = truncated_svd(matrix, 3)
    # A float32 below 1e-38 has few digits: the values are compared to the smallest step there is.
    torch.testing.assert_close(
        values.double() / magnitude, spectrum("power 1", size)[:3], rtol=1e-4, atol=3e-45 / magnitude
    )
    torch.testing.assert_close(left.T @ left, torch.eye(3), rtol=0, atol=5e-6)
    torch.testing.assert_close(right @ right.T, torch.eye(3), rtol=0, atol=5e-6)


def test_entries_of_1e38_are_within_range_as_long_as_their_singular_values_are():
    left, values, right = truncated_svd(torch.tensor([[1e38, 0.0], [0.0, -3e38]]), 2)
    torch.testing.assert_close(values, torch.tensor([3e38, 1e38]))
    torch.testing.assert_close((left * values) @ right, torch.tensor([[1e38, 0.0], [0.0, -3e38]]))


def test_a_singular_value_beyond_float32_is_an_error_and_not_infinity():
    with pytest.raises(NumericalError, match=r"a singular value exceeds the range of torch.float32"):
        truncated_svd(torch.full((20, 20), 1e38), 1)


def test_singular_values_beyond_float32_are_found_in_float64():
    assert float(singular_values(torch.full((20, 20), 1e38))[0]) == pytest.approx(2e39, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [lambda a: truncated_svd(a, 1), singular_values], ids=["svd", "values"])
def test_nan_and_infinity_are_refused(function, bad: float):
    matrix = gaussian(5, 4)
    matrix[2, 3] = bad
    with pytest.raises(NumericalError, match="the weight holds NaN or infinite values"):
        function(matrix)


def test_a_transposed_view_decomposes_like_any_other():
    matrix = gaussian(500, 600)
    left, values, right = truncated_svd(matrix.T, 4)
    assert_well_formed(matrix.T, left, values, right)
    assert_as_good_as_promised(matrix.T, 4)


def test_float64_keeps_float64_accuracy():
    matrix = gaussian(30, 20).double()
    left, values, right = truncated_svd(matrix, 20)
    torch.testing.assert_close((left * values) @ right, matrix, rtol=0, atol=1e-13)


def test_a_weight_that_asks_for_gradients_gives_factors_that_do_not():
    assert not any(part.requires_grad for part in truncated_svd(gaussian(9, 8).requires_grad_(), 2))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (1, 9), (9, 1)])
def test_singular_values_are_those_of_a_float64_decomposition(shape: tuple[int, int]):
    matrix = gaussian(*shape)
    values = singular_values(matrix)
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix.double()), rtol=1e-9, atol=0)


@pytest.mark.parametrize("rate", [3.0, 8.0, 12.0, 30.0])
def test_tail_sums_of_singular_values_are_right_down_to_a_millionth(rate: float):
    matrix = torch.diag(torch.exp(-torch.arange(300, dtype=torch.float64) / rate).float())
    exact = matrix.double().diagonal().square().flip(0).cumsum(0).flip(0).sqrt()
    tails = singular_values(matrix).square().flip(0).cumsum(0).flip(0).sqrt()
    matters = exact > 1e-6 * exact[0]
    torch.testing.assert_close(tails[matters], exact[matters], rtol=1e-3, atol=0)


@pytest.mark.parametrize("matrix", [torch.zeros(4, 7), torch.full((7, 4), 2.0)], ids=["zero", "constant"])
def test_singular_values_of_degenerate_matrices_are_neither_negative_nor_nan(matrix: Tensor):
    values = singular_values(matrix)
    assert values.shape == (4,)
    assert float(values[0]) == pytest.approx(float(torch.linalg.norm(matrix)))
    assert float(values[1:].abs().max()) <= 1e-12
    assert (values >= 0).all()


@pytest.mark.parametrize(
    ("relative_error", "rank"),
    [(0.0, 4), (1e-9, 4), (0.19, 4), (0.21, 3), (0.5, 2), (0.81, 1), (1.0, 1), (5.0, 1)],
)
def test_the_rank_for_an_error_is_the_smallest_that_reaches_it(relative_error: float, rank: int):
    values = torch.tensor([3.0, 3.0, 2.0, 1.0])  # squares 9, 9, 4, 1 of 23: tails 0.780, 0.466, 0.209
    assert rank_for_error(values, relative_error) == rank


def test_values_of_zero_are_never_counted():
    assert rank_for_error(torch.tensor([2.0, 1.0, 0.0, 0.0]), 0.0) == 2


def test_only_a_zero_matrix_needs_rank_zero():
    assert rank_for_error(torch.zeros(5), 0.1) == 0


def test_the_rank_for_an_error_survives_huge_and_tiny_values():
    values = torch.tensor([3.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert rank_for_error(values * 1e300, 0.5) == rank_for_error(values * 1e-300, 0.5) == 2


@pytest.mark.parametrize("relative_error", [0.9, 0.5, 0.1, 1e-2, 1e-4])
def test_the_rank_for_an_error_reaches_it_and_one_less_does_not(relative_error: float):
    matrix = with_spectrum(spectrum("exponential", 100), 120, 100)
    rank = rank_for_error(singular_values(matrix), relative_error)
    norm = float(torch.linalg.norm(matrix.double()))
    assert error_of(matrix, *truncated_svd(matrix, rank)) <= relative_error * norm * (1 + 1e-3)
    assert rank == 1 or error_of(matrix, *truncated_svd(matrix, rank - 1)) > relative_error * norm


@pytest.mark.parametrize("shape", [(80, 60), (900, 700)])
def test_an_eigensolver_that_fails_to_converge_is_no_end(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]):
    def fails(*_: Tensor) -> None:
        raise torch.linalg.LinAlgError("not converged")

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert_as_good_as_promised(matrix, 8)
    monkeypatch.setattr(torch.linalg, "svd", fails)
    with pytest.raises(NumericalError, match="does not converge"):
        truncated_svd(matrix, 8)


@pytest.mark.parametrize("shape", [(80, 60), (900, 700)])
def test_an_eigensolver_that_returns_nan_unannounced_is_no_end(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]):
    """As LAPACK's did on the float32 Gram matrix of a published weight, with one thread and not with two."""
    solve = torch.linalg.eigh

    def spoils(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = solve(gram)
        return values, vectors.index_fill(1, torch.tensor([vectors.shape[1] - 1]), torch.nan)

    monkeypatch.setattr(torch.linalg, "eigh", spoils)
    assert_as_good_as_promised(torch.randn(shape, generator=torch.Generator().manual_seed(0)), 8)
