"""Products of sparse matrices: X ~ scale S_1 S_2 ... S_Q, each S_j in a set of sparse matrices of norm 1.

Letters: m, n = rows and columns of X; S (a, b) = a factor; L (m, a) = the product of the factors before it; R (b, n) =
of those after it; N = R R* (b, b); M = X R* (m, b); d = size of a square matrix. Conjugate transposes throughout, so
that complex matrices work as well.

X enters an update of S only through L*M, and R only through N. Going from the last factor to the first, N and M follow
from their predecessors by products with the small factors; of the products as large as X there are five a sweep,
whatever Q, and norms, best scale and error are read off M and N.

L. Le Magoarou, R. Gribonval, "Flexible multilayer sparse approximations of matrices and applications", 2016: one
projected gradient step for one factor after the other (palm4msa), and one factor split off after the other.
J. Bolte, S. Sabach, M. Teboulle, "Proximal alternating linearized minimization for nonconvex and nonsmooth problems",
2014: why that converges with steps below 1 / (scale ||L|| ||R||)^2.
T. Blumensath, M. Davies, "Normalized iterative hard thresholding", 2010: longer steps, measured inside the support.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.sparse_sets import (
    Level,
    Projection,
    default_count,
    last_set,
    sparse_product_levels,
)

_STEP_SAFETY = 1.001  # on the Lipschitz constant, as in the paper: its norms are estimated from below
_POWER_STEPS = 100
_POWER_SETTLED = 1e-6  # relative change of the estimated norm at which the iteration ends
_CANCELS = 1e-6  # of ||X||^2; a smaller squared error is lost in the difference it is computed from
_EXACT_BY_SUMS = 1e-13  # of ||X||^2; a squared error that may be all rounding in that difference
_EXACT = 1e-30  # of ||X||^2; a squared error that rounding alone leaves


@dataclass(frozen=True)
class _Iterate:
    scale: float
    factors: list[Tensor]
    squared_error: float


@dataclass(frozen=True)
class _Quadratic:
    """The squared error as a function of one factor: total - 2 Re <pull, S> + <S, gram S n_r>; None is an identity."""

    total: float  # ||X||^2
    pull: Tensor  # (a, b) = L* X R*
    gram: Tensor | None  # (a, a) = L* L
    n_r: Tensor | None  # (b, b) = R R*

    def curved(self, factor: Tensor) -> Tensor:
        left = factor if self.gram is None else self.gram @ factor
        return left if self.n_r is None else left @ self.n_r

    def outer(self, factor: Tensor) -> Tensor:
        """(a, a): N of the factor before."""
        return factor @ (factor.mH if self.n_r is None else self.n_r @ factor.mH)

    def fit_scale(self, factor: Tensor, outer: Tensor) -> tuple[float, float]:
        """Return the best scale of ``factor``, <X, P> / ||P||^2 of the product P, and the squared error it leaves."""
        inner = _inner(self.pull, factor)
        square = float(outer.trace().real) if self.gram is None else _inner(self.gram, outer)
        return (inner / square, self.total - inner**2 / square) if square > 0 else (0.0, self.total)


_Warm = dict[tuple[int, str], Tensor]  # singular vectors of (factor, side), where the next power iteration starts


def palm4msa(
    matrix: Tensor,
    factors: Sequence[Tensor],
    projections: Sequence[Projection],
    *,
    iterations: int,
    tolerance: float = 1e-6,
) -> tuple[float, list[Tensor]]:
    """Return scale and factors near ``factors`` whose product is nearer to ``matrix``.

    matrix: (m, n), float64 or complex128; factors: (m, b_1), (b_1, b_2), ... (b, n), one projection for each.

    Ends after ``iterations`` sweeps, or when the squared error changes by less than ``tolerance`` of itself. The best
    sweep is returned; the start itself if none is better.
    """
    total = _squared_norm(matrix)
    best = current = _measured(matrix, list(factors), total)
    warm: _Warm = {}
    for _ in range(iterations):
        before = current.squared_error
        current = _sweep(matrix, current, projections, total, warm)
        if current.squared_error < best.squared_error:
            best = current
        if current.squared_error <= _EXACT * total or abs(before - current.squared_error) <= tolerance * before:
            break
    return best.scale, best.factors


def hierarchical(
    matrix: Tensor,
    levels: Sequence[Level],
    *,
    iterations: int = 30,
    tolerance: float = 1e-6,
    residual_on_right: bool = True,
) -> tuple[float, list[Tensor]]:
    """Split one factor after the other off ``matrix``, each time refining all there are: len(levels) + 1 factors.

    matrix: (m, n), float64 or complex128. From random or identical starts many factors at once end in poor minima;
    two at a time, from a residual that is dense at first, do not (Le Magoarou and Gribonval 2016, section IV).
    """
    done: list[Tensor] = []
    sets: list[Projection] = []
    residual, scale = matrix, 1.0
    for level in levels:
        pair = [level.factor, level.residual] if residual_on_right else [level.residual, level.factor]
        m, n = residual.shape
        start = [torch.eye(m, level.between).to(residual), residual.new_zeros(level.between, n)]
        _, parts = palm4msa(residual, start, pair, iterations=iterations, tolerance=tolerance)
        if residual_on_right:
            factors, projections = [*done, *parts], [*sets, *pair]
        else:
            factors, projections = [*parts, *done], [*pair, *sets]
        scale, factors = palm4msa(matrix, factors, projections, iterations=iterations, tolerance=tolerance)
        if residual_on_right:
            *done, residual = factors
            sets = projections[:-1]
        else:
            residual, *done = factors
            sets = projections[1:]
    return scale, [*done, residual] if residual_on_right else [residual, *done]


def sparse_product(
    matrix: Tensor, nonzeros: int, count: int | None = None, *, iterations: int = 30, tolerance: float = 1e-4
) -> tuple[float, list[Tensor]]:
    """Return scale and ``count`` sparse factors of ``matrix``, left to right: matrix ~ scale F_1 F_2 ... F_count.

    matrix: (rows, columns), real, not empty; nonzeros: s >= 1, for every row and column of a factor; count >= 1, by
    default floor(log2) of the larger size. The factors are float64. The error never exceeds that of the largest
    ``nonzeros`` entries of every row and column: the last resort, with identities for the other factors.

    Raises NumericalError for NaN and infinity, or if the scale exceeds the range of float64.
    """
    if not bool(matrix.isfinite().all()):
        raise NumericalError("the weight holds NaN or infinite values")
    rows, columns = matrix.shape
    count = default_count(rows, columns) if count is None else count
    wide = matrix.detach().double()
    wide = wide if rows <= columns else wide.T
    exponent = math.frexp(float(wide.abs().max()))[1]
    # A power of two changes no digit; in two steps, because 2^1074, which the smallest needs, is no float64 itself.
    wide = wide * math.ldexp(1.0, -exponent // 2) * math.ldexp(1.0, -exponent - -exponent // 2)
    scale, factors = _wide_product(wide, nonzeros, count, iterations, tolerance)
    try:
        scale = math.ldexp(scale, exponent)
    except OverflowError as error:
        raise NumericalError("the scale exceeds the range of float64; scale the weight down") from error
    return scale, factors if rows <= columns else [factor.T.contiguous() for factor in reversed(factors)]


def _wide_product(
    wide: Tensor, nonzeros: int, count: int, iterations: int, tolerance: float
) -> tuple[float, list[Tensor]]:
    """Do the work of sparse_product for rows <= columns and magnitudes below 1."""
    rows, columns = wide.shape
    total = _squared_norm(wide)
    identities = [torch.eye(rows, dtype=wide.dtype, device=wide.device)] * (count - 1)
    largest = last_set(rows, columns, nonzeros)(wide)
    plain_scale = _inner(largest, wide)
    plain_error = total - plain_scale**2
    # Zero matrices end here, and from full_nonzeros on all do.
    if count == 1 or plain_error <= _EXACT_BY_SUMS * total:
        return plain_scale, [*identities, largest]
    levels = sparse_product_levels(rows, columns, nonzeros, count)
    scale, factors = hierarchical(wide, levels, iterations=iterations, tolerance=tolerance)
    if _squared_norm(wide - scale * product(factors)) > plain_error:
        return plain_scale, [*identities, largest]
    return scale, factors


def product(factors: Sequence[Tensor]) -> Tensor:
    """Multiply the factors, the last two first: with the residual on the right that is the cheapest order."""
    return reduce(lambda right, left: left @ right, reversed(factors))


def _sweep(matrix: Tensor, start: _Iterate, projections: Sequence[Projection], total: float, warm: _Warm) -> _Iterate:
    """Update every factor once, the last first, and the scale with each."""
    factors, scale, error = list(start.factors), start.scale, start.squared_error
    before = _prefixes(factors)
    m_r, n_r = matrix, None
    for j in range(len(factors) - 1, -1, -1):
        left = before[j]
        pull, gram = (m_r, None) if left is None else (left.mH @ m_r, left.mH @ left)
        quadratic = _Quadratic(total, pull, gram, n_r)
        descent = torch.sub(pull, quadratic.curved(factors[j]), alpha=scale)
        outer = None
        for step in _steps(quadratic, factors[j], descent, j, warm):
            moved = projections[j](torch.add(factors[j] * scale, descent, alpha=step.length))
            moved_outer = quadratic.outer(moved)
            moved_scale, moved_error = quadratic.fit_scale(moved, moved_outer)
            if step.is_safe or moved_error < error:
                factors[j], scale, error, outer = moved, moved_scale, moved_error, moved_outer
                break
        n_r = quadratic.outer(factors[j]) if outer is None else outer
        if j > 0:
            m_r = m_r @ factors[j].mH
    if error < _CANCELS * total:
        error = _squared_norm(matrix - scale * product(factors))
    return _Iterate(scale, factors, error)


@dataclass(frozen=True)
class _Step:
    length: float
    is_safe: bool  # short enough for any matrix, in whatever direction


def _steps(quadratic: _Quadratic, factor: Tensor, descent: Tensor, j: int, warm: _Warm) -> Iterator[_Step]:
    """Yield the lengths to try, none if the product does not depend on the factor.

    First the best along the gradient inside the support, taken only if it lowers the error. It is several times
    1 / (||L|| ||R||)^2, which comes second: only the steepest direction needs steps that short.
    """
    inside = descent * (factor != 0)
    curvature = _inner(inside, quadratic.curved(inside))
    if curvature > 0:
        yield _Step(_squared_norm(inside) / curvature, is_safe=False)
    norms = _top_eigenvalue(quadratic.gram, (j, "left"), warm) * _top_eigenvalue(quadratic.n_r, (j, "right"), warm)
    if norms > 0:
        yield _Step(1 / (_STEP_SAFETY * norms), is_safe=True)


def _measured(matrix: Tensor, factors: list[Tensor], total: float) -> _Iterate:
    """Return the factors with the best scale of their product."""
    approximation = product(factors)
    square = _squared_norm(approximation)
    scale = _inner(approximation, matrix) / square if square > 0 else 1.0  # a zero product has no use for it
    return _Iterate(scale, factors, _squared_norm(matrix - scale * approximation) if square > 0 else total)


def _prefixes(factors: list[Tensor]) -> list[Tensor | None]:
    """Return the product of the factors before each of them; None before the first."""
    prefixes: list[Tensor | None] = [None]
    for factor in factors[:-1]:
        last = prefixes[-1]
        prefixes.append(factor if last is None else last @ factor)
    return prefixes


def _top_eigenvalue(gram: Tensor | None, key: tuple[int, str], warm: _Warm) -> float:
    """Estimate the largest eigenvalue of a Gram matrix, 1 of None, by power iteration from where it last ended."""
    if gram is None:
        return 1.0
    vector = warm.get(key)
    if vector is None:
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(len(gram), dtype=torch.float64, generator=generator).to(gram)
        vector = vector / torch.linalg.vector_norm(vector)
    value = 0.0
    for _ in range(_POWER_STEPS):
        image = gram @ vector
        last, value = value, float(torch.linalg.vector_norm(image))
        if value == 0:
            return 0.0
        vector = image / value
        if abs(value - last) <= _POWER_SETTLED * value:
            break
    warm[key] = vector
    return value


def _inner(one: Tensor, other: Tensor) -> float:
    return float(torch.vdot(one.reshape(-1), other.reshape(-1)).real)


def _squared_norm(matrix: Tensor) -> float:
    return float(torch.linalg.vector_norm(matrix)) ** 2
