"""The canonical polyadic decomposition by alternating least squares, with the norms of its components kept bounded.

Letters: d = order; n_k = size of mode k; R = rank; a, b = products of the sizes of two groups of modes.
Inside, factors are turned: rows (R, n_k) of norm 1, so that every product is a matrix product on the tensor as it lies.

R. A. Harshman, "Foundations of the PARAFAC procedure", 1970: alternating least squares.
A.-H. Phan, P. Tichavsky, A. Cichocki, "Fast alternating LS algorithms for high order CANDECOMP/PARAFAC tensor
factorizations", 2013: two passes over the tensor serve all modes.
A.-H. Phan, P. Tichavsky, A. Cichocki, "Error preserving correction", 2018, and A.-H. Phan et al., "Stable low-rank
tensor decomposition for compression of convolutional neural network", 2020: components that cancel, and the cure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.eigen import symmetric_eigen
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two
from tcompress.linalg.svd import truncated_svd

NORM_LIMIT = 16.0  # times ||X||^2: what cp_als lets the squared norms of all components sum up to
DEGENERATE = 20.0  # times the squared norm of their sum: components this large cancel each other
OPPOSED = -0.5  # two components of a smaller congruence point against each other

_FIRST_LIMIT = 8.0  # times ||X||^2: the first sweeps under so tight a limit stay out of the swamps
_RELAX = 1e-3  # relative fall of the error per sweep, below which the first limit, where reached, gives way
_MEASURES = {torch.float32: 1e-4, torch.float64: 1e-9}  # of ||X||^2; a smaller difference of sums is rounding noise
_ENTRIES_AT_ONCE = 1 << 20  # of the tensor, compared in float64 at one time


def cp_als(
    tensor: Tensor, rank: int, *, seed: int = 0, starts: int = 3, sweeps: int = 200, tolerance: float = 1e-6
) -> tuple[Tensor, list[Tensor]]:
    """Approximate ``tensor`` by a sum of ``rank`` components, each the outer product of one column per factor.

    tensor: float32 or float64, order 2 or more, not empty; rank, starts >= 1. Returns weights (rank,), >= 0 and
    descending, and factors (n_k, rank), columns of norm 1, the largest magnitude of each positive, except in the last
    mode larger than 1, which takes the component's sign. The best of several starts is improved until the error falls
    by less than ``tolerance`` of itself in a sweep, or ``sweeps`` are over. The squared weights sum up to NORM_LIMIT
    ||X||^2 at most: without a bound components may diverge and cancel while the error falls for ever. Matrices, and
    ranks that any tensor of this shape has, are decomposed directly. The same tensor and seed give the same bits on
    the same machine and number of threads.
    Raises NumericalError if an entry is NaN or infinite, or a weight exceeds the range of the dtype.
    """
    kept = [k for k, n in enumerate(tensor.shape) if n > 1] or [0]
    scaled, exponent, total = _prepared(tensor.reshape([tensor.shape[k] for k in kept]))
    if rank >= scaled.numel() // max(scaled.shape):
        rows = _unfolded(scaled)
    elif scaled.ndim == 2:
        left, values, right = truncated_svd(scaled, rank, seed=seed)
        rows = [(left * values).T, right]
    elif total == 0:
        rows = [scaled.new_zeros(rank, n) for n in scaled.shape]
    else:
        fit = _best_start(scaled, total, rank, starts, seed)
        rows = _descend(scaled, total, fit, sweeps, tolerance).components()
    weights, factors = _presentable(rows, rank, exponent, tensor.dtype)
    return weights, [factors[kept.index(k)] if k in kept else tensor.new_ones(1, rank) for k in range(tensor.ndim)]


def cp_sweeps(tensor: Tensor, initial: Sequence[Tensor], sweeps: int) -> tuple[Tensor, list[Tensor], list[float]]:
    """Return weights and factors after unbounded sweeps from ``initial``, (n_k, R) each, and each relative error."""
    scaled, exponent, total = _prepared(tensor)
    fit, errors = _Fit([factor.to(tensor).T for factor in initial]), []
    for _ in range(sweeps):
        _sweep(scaled, total, fit)
        errors.append(math.sqrt(fit.square / (total or 1)))
    return *_presentable(fit.components(), len(fit.weights), exponent, tensor.dtype), errors


def cp_reconstruct(weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the components: (n_1, ..., n_d). weights: (R,); factors: (n_k, R) each."""
    cut = len(factors) // 2
    sizes = [len(factor) for factor in factors]
    rows, columns = math.prod(sizes[:cut]), math.prod(sizes[cut:])
    whole = weights.new_zeros(rows, columns)
    # So many components at a time that their products take no more memory than the tensor.
    step = max(1, rows * columns // (rows + columns))
    for start in range(0, len(weights), step):
        part = slice(start, start + step)
        head = _product([factor[:, part].T for factor in factors[:cut]])
        tail = _product([factor[:, part].T for factor in factors[cut:]])
        whole = whole + (head.T * weights[part]) @ tail
    return whole.reshape(sizes)


def congruence(factors: Sequence[Tensor]) -> Tensor:
    """Return the cosines between the components: (R, R) float64. factors: (n_k, R) each, columns of norm 1."""
    return reduce(torch.mul, [factor.double().T @ factor.double() for factor in factors])


def is_degenerate(weights: Tensor, factors: Sequence[Tensor]) -> bool:
    """Say whether the components cancel: some point against each other, and all are far longer than their sum."""
    cosines, wide = congruence(factors), weights.double() / weights.double().max().clamp_min(1e-300)
    return bool(cosines.min() < OPPOSED and wide.square().sum() > DEGENERATE * (wide @ cosines @ wide))


def limit_norms(
    tensor: Tensor, weights: Tensor, factors: Sequence[Tensor], *, error: float = 0.0, sweeps: int = 50
) -> tuple[Tensor, list[Tensor]]:
    """Return weights and factors of the least sum of squared weights found at no larger an error, or those given.

    The error-preserving correction of Phan, Tichavsky and Cichocki (2018): one factor after the other is replaced by
    the shortest whose error is at most ``error`` ||X||, or what it was if that is larger: within 1e-6 of that, and
    what rounding the factors to their dtype adds (10 eps ||X|| at most).
    """
    scaled, exponent, total = _prepared(tensor)
    fit = _Fit([factor.T for factor in factors], times_power_of_two(weights.double(), -exponent))
    fit = _corrected(scaled, total, fit, error, sweeps)
    return _presentable(fit.components(), len(weights), exponent, tensor.dtype)


class _Fit:
    """weights (R,): norms of the components; rows (R, n_k): of norm 1; grams: rows @ rows.T; square: the error's."""

    def __init__(self, rows: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Take rows of any norm, which is dropped, and weights in float64, zero if not given."""
        self.rows, self.grams, self.square = list(rows), list(rows), math.inf
        self.weights: Tensor
        for mode, row in enumerate(rows):
            self.replace(mode, row.double())
        self.weights = self.weights * 0 if weights is None else weights

    def replace(self, mode: int, component_rows: Tensor) -> None:
        """Take (R, n_k) rows of any norm for one mode: the norms become the weights."""
        self.weights = torch.linalg.vector_norm(component_rows, dim=1)
        unit = component_rows / self.weights.clamp_min(1e-300)[:, None]
        self.rows[mode] = unit.to(self.rows[mode].dtype).contiguous()  # LAPACK leaves columns, slow in batched products
        wide = self.rows[mode].double()
        self.grams[mode] = wide @ wide.T

    def unscaled(self, mode: int) -> Tensor:
        return self.rows[mode] * self.weights[:, None]  # float64, like the weights

    def square_norms(self) -> float:
        return float(self.weights.square().sum())

    def gram_without(self, mode: int) -> Tensor:
        return reduce(torch.mul, [gram for k, gram in enumerate(self.grams) if k != mode])

    def components(self) -> list[Tensor]:
        return [self.unscaled(0), *self.rows[1:]]


def _prepared(tensor: Tensor) -> tuple[Tensor, int, float]:
    """Return the tensor in row-major order times 2^-exponent, the exponent, and the square of the scaled norm."""
    scaled, exponent = scaled_to_unit(tensor.detach())
    return scaled.contiguous(), exponent, float(torch.linalg.vector_norm(scaled, dtype=torch.float64)) ** 2


def _best_start(tensor: Tensor, total: float, rank: int, starts: int, seed: int) -> _Fit:
    """Try all starts for five sweeps, the better half for twice as many, and so on until one is left."""
    generator = torch.Generator().manual_seed(seed)

    def random_rows(count: int) -> list[Tensor]:
        return [torch.randn(count, n, generator=generator).to(tensor) / math.sqrt(n) for n in tensor.shape]

    leading = [0.1 * row for row in random_rows(rank)]  # lest exact singular vectors be orthogonal to what is sought
    for mode, image in _images(tensor, random_rows(rank + 8), range(tensor.ndim)):
        # Random combinations of the mode's fibres span nearly what its leading singular vectors do.
        found = truncated_svd(image, rank)[2]
        leading[mode] = torch.cat([leading[mode][: len(found)] + found, leading[mode][len(found) :]])
    fits = [_Fit(leading), *(_Fit(random_rows(rank)) for _ in range(starts - 1))]
    sweeps = 5
    while len(fits) > 1:
        for fit in fits:
            for _ in range(sweeps):
                _sweep(tensor, total, fit, _FIRST_LIMIT * total)
        fits = sorted(fits, key=lambda fit: fit.square)[: len(fits) // 2]
        sweeps *= 2
    return fits[0]


def _descend(tensor: Tensor, total: float, fit: _Fit, sweeps: int, tolerance: float) -> _Fit:
    limit = _FIRST_LIMIT * total
    for _ in range(sweeps):
        before = min(fit.square, total)
        _sweep(tensor, total, fit, limit)
        fall = before - fit.square  # of the square: twice that of the error
        if fall < 2 * _RELAX * before and limit < NORM_LIMIT * total and fit.square_norms() > 0.99 * limit:
            limit = NORM_LIMIT * total
        elif fall <= 2 * tolerance * before:
            break
    return fit if fit.square_norms() <= _FIRST_LIMIT * total else _corrected(tensor, total, fit, 0.0, 10)


def _sweep(tensor: Tensor, total: float, fit: _Fit, limit: float = math.inf) -> None:
    """Replace the rows of each mode in turn by the best ones, of norms within the limit, and measure the error."""
    # A little of the squared distance from the old rows is added: the system is regular, and no fixed point moves.
    ridge = max(10 * torch.finfo(tensor.dtype).eps, 1e-12)  # of the mean eigenvalue of a Gram matrix, which is 1
    shift = ridge * torch.eye(len(fit.weights), dtype=torch.float64, device=tensor.device)
    for mode, image in _images(tensor, fit.rows, range(tensor.ndim)):
        wide, gram = image.double(), fit.gram_without(mode)
        lower = torch.linalg.cholesky_ex(gram + shift)[0]
        fit.replace(mode, torch.cholesky_solve(torch.add(wide, fit.unscaled(mode), alpha=ridge), lower))
        if limit < math.inf and fit.square_norms() > limit:
            fit.replace(mode, _damped(gram, wide, lambda s, q, ridges: -(q / (s + ridges) ** 2).sum(dim=1), -limit, 1))
    fit.square = total + float((fit.unscaled(mode) * torch.addmm(wide, gram, fit.unscaled(mode), beta=-2)).sum())
    if fit.square < _MEASURES[tensor.dtype] * total:
        fit.square = _square_error(tensor, fit)


def _corrected(tensor: Tensor, total: float, fit: _Fit, error: float, sweeps: int) -> _Fit:
    """Return the fit of the least norms found at an error of at most ``error`` ||X||, or its own if that is larger."""
    # In float64: what cancels has lost the digits of float32.
    wide, result = tensor.double(), _Fit([row.double() for row in fit.rows], fit.weights)
    allowed = max(_square_error(tensor, fit), error**2 * total)
    if allowed < _MEASURES[torch.float64] * total:
        return fit
    for _ in range(sweeps):
        before = result.square_norms()
        for mode, image in _images(wide, result.rows, range(tensor.ndim)):
            result.replace(mode, _shortest(result.gram_without(mode), image, total, allowed))
        if result.square_norms() > (1 - 1e-4) * before:
            break
    result = _Fit([row.to(tensor.dtype) for row in result.rows], result.weights)
    bound = (1 + 1e-6) * math.sqrt(allowed) + 10 * torch.finfo(tensor.dtype).eps * math.sqrt(total)
    is_better = result.square_norms() <= fit.square_norms() and math.sqrt(_square_error(tensor, result)) <= bound
    return result if is_better else fit


def _shortest(gram: Tensor, image: Tensor, total: float, allowed: float) -> Tensor:
    """Return the rows of least norm among those whose squared error is at most ``allowed``."""
    target = allowed - total
    return _damped(gram, image, lambda s, q, ridges: (q / s * ((ridges / (s + ridges)) ** 2 - 1)).sum(dim=1), target, 0)


def _damped(gram: Tensor, image: Tensor, rising: Callable[..., Tensor], target: float, side: int) -> Tensor:
    """Solve with the ridge just below (side 0) or above (1) that at which a ``rising`` function reaches ``target``.

    rising: of the eigenvalues (R,), the squares of the turned image (R,) and ridges (count, 1), gives (count,). Nested
    grids of exponents take fewer calls than a bisection.
    """
    values, vectors = symmetric_eigen(gram)
    values, turned = values.clamp_min(1e-14 * float(values[-1])), vectors.T @ image  # smaller ones are rounding noise
    squares, ends = turned.square().sum(dim=1), (-18.0, 6.0)
    for _ in range(4):
        exponents = torch.linspace(*ends, 65, dtype=torch.float64, device=gram.device)
        index = min(max(int((rising(values, squares, 10 ** exponents[:, None]) <= target).sum()), 1), 64)
        ends = float(exponents[index - 1]), float(exponents[index])
    return vectors @ (turned / (values + 10 ** ends[side])[:, None])


def _images(block: Tensor, rows: list[Tensor], modes: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield each mode with the tensor contracted with the rows of all others, (R, n_k), as they are by then.

    block: the tensor, or (R, ...), what is left of it after contracting the modes not in ``modes``. These are halved
    again and again: only the first two products see the whole tensor.
    """
    if len(modes) == 1:
        yield modes[0], block
        return
    sizes = [rows[k].shape[1] for k in modes]
    cut = min(range(1, len(modes)), key=lambda c: math.prod(sizes[:c]) + math.prod(sizes[c:]))
    is_whole = len(modes) == len(rows)
    matrix = block.reshape(*([] if is_whole else [len(block)]), math.prod(sizes[:cut]), -1)
    for part, rest, turned in ((modes[:cut], modes[cut:], matrix.mT), (modes[cut:], modes[:cut], matrix)):
        product = _product([rows[k] for k in rest])
        yield from _images(product @ turned if is_whole else (product[:, None] @ turned)[:, 0], rows, part)


def _product(rows: Sequence[Tensor]) -> Tensor:
    """Return the outer products of the rows of several modes: (R, a), the last mode the fastest."""
    return reduce(lambda product, row: (product[:, :, None] * row[:, None]).flatten(1), rows)


def _square_error(tensor: Tensor, fit: _Fit) -> float:
    """Measure the squared error entry by entry: slower than a difference of squared norms, but right for small ones."""
    cut = tensor.ndim // 2
    head, tail = (_product([row.double() for row in part]) for part in (fit.rows[:cut], fit.rows[cut:]))
    count = max(1, _ENTRIES_AT_ONCE // tail.shape[1])
    blocks = torch.split(tensor.reshape(head.shape[1], tail.shape[1]), count)
    parts = zip(blocks, torch.split(head.T * fit.weights, count), strict=True)
    return sum(float(torch.addmm(part.double(), left, tail, alpha=-1).square().sum()) for part, left in parts)


def _unfolded(tensor: Tensor) -> list[Tensor]:
    """Return the rows of the decomposition that every tensor has: its fibres along the largest mode, in place."""
    mode = max(range(tensor.ndim), key=lambda k: tensor.shape[k])
    fibres = tensor.movedim(mode, -1).reshape(-1, tensor.shape[mode])
    others = [n for k, n in enumerate(tensor.shape) if k != mode]
    indices = torch.unravel_index(torch.arange(len(fibres), device=tensor.device), others) if others else ()
    rows = [torch.nn.functional.one_hot(i, n).to(fibres) for i, n in zip(indices, others, strict=True)]
    return [*rows[:mode], fibres, *rows[mode:]]


def _presentable(rows: list[Tensor], rank: int, exponent: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return weights and factors as cp_als promises them, from (R, n_k) rows of any norm, R at most ``rank``."""
    wide = [torch.cat([row.double(), row.new_zeros(rank - len(row), row.shape[1]).double()]) for row in rows]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in wide])  # (d, rank)
    weights, order = norms.prod(dim=0).sort(descending=True, stable=True)
    factors, signs = [], torch.ones_like(weights)
    for row, norm in zip(wide, norms, strict=True):
        row[norm == 0, 0] = 1  # what has no weight has any direction
        factor = (row / torch.where(norm == 0, 1, norm)[:, None])[order].T.contiguous()
        sign = factor.gather(0, factor.abs().argmax(dim=0, keepdim=True)).sign()
        factors.append((factor * sign).to(dtype))
        signs = signs * sign[0]
    factors[-1] *= signs.to(dtype)
    weights = times_power_of_two(weights, exponent).to(dtype)
    if not all(part.isfinite().all() for part in (weights, *factors)):
        raise NumericalError(f"a weight of the components exceeds the range of {dtype}; scale the weight down")
    return weights, factors
