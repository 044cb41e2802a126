"""Low-rank and sparse fits that minimise the error of a layer's OUTPUT, given the second moment of its input.

Letters: A = the matrix (m, n); L, S = its low-rank and sparse parts; E = A - L - S; G = the second moment E[x xT],
(n, n), or its diagonal (n,), or one block (b, b) of it, b a divisor of n, that stands on its diagonal n / b times, with
zeros elsewhere; d = square roots of the diagonal; k = entries of S that are not zero.

The error minimised is tr(E G ET), the mean square of E x. With the diagonal alone that is the alternation of OATS,
with all of G the problem of HASSLE-free and 3BASiL.

S. Zhang, V. Papyan, "OATS: outlier-aware pruning through sparse and low rank decomposition", 2025.
M. Makni et al., "HASSLE-free: a unified framework for sparse plus low-rank matrix decomposition for LLMs", 2025.
T. Blumensath, M. Davies, "Normalized iterative hard thresholding", 2010: the step of the sparse part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.eigen import symmetric_eigen
from tcompress.linalg.magnitude import keep_largest
from tcompress.linalg.svd import truncated_svd
from tcompress.linalg.trimmed import Product, Summand

_FLAT = 1e-10  # of the largest eigenvalue: directions of the input that are rounding noise
_SETTLED = 1e-4  # of the error: a smaller gain of a whole round ends the search
_HARD_STEPS = 4  # of thresholding in one round
_SOLVER_STEPS = 6  # of conjugate gradients in one round, for the values on a support
_MOST_SOLVER_STEPS = 60  # ... and to settle them
_SLIGHT = 2e-6  # of the squared error: the values have settled when a step gains less
_SUPPORT_ROUNDS = 10  # of moving a support with no low-rank part beside it
_MOVED = 1e-3  # of the error: a smaller gain of such a round ends them

Part = TypeVar("Part", bound=Summand)
Keep = Callable[[Tensor], Tensor]  # values -> a copy that is zero but where the largest are


def require_moment(gram: Tensor, fan_in: int) -> None:
    """Raise NumericalError unless ``gram`` is a finite second moment of so many inputs, its diagonal or its block."""
    block = gram.shape[-1] if gram.ndim == 2 else fan_in
    if tuple(gram.shape) not in {(fan_in,), (block, block)} or not block or fan_in % block:
        raise NumericalError(f"a second moment of {fan_in} inputs cannot have the shape {tuple(gram.shape)}")
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    if not bool(torch.isfinite(gram).all()) or bool((diagonal < 0).any()) or not bool((diagonal > 0).any()):
        raise NumericalError("the second moment of the input is not finite, or negative, or zero")


def times(error: Tensor, gram: Tensor) -> Tensor:
    """Return ``error @ G``, G given whole, by its diagonal or by its block."""
    if gram.ndim == 1:
        return error * gram
    block = gram.shape[-1]
    if block == error.shape[-1]:
        return error @ gram
    return (error.reshape(*error.shape[:-1], -1, block) @ gram).reshape(error.shape)


def diagonal_of(gram: Tensor, fan_in: int) -> Tensor:
    """Return the diagonal of G, (..., n), of so many inputs."""
    diagonal = gram if gram.ndim == 1 else gram.diagonal(dim1=-2, dim2=-1)
    return diagonal if diagonal.shape[-1] == fan_in else diagonal.repeat(fan_in // diagonal.shape[-1])


def whole_of(gram: Tensor, fan_in: int) -> Tensor:
    """Return G itself, (n, n), for what cannot do with less."""
    if gram.ndim == 1:
        return gram.diag()
    return torch.kron(torch.eye(fan_in // len(gram)).to(gram), gram)


def output_error(error: Tensor, gram: Tensor) -> float:
    """Return the root of tr(E G ET)."""
    return _root_of_product(error, times(error, gram))


def _root_of_product(error: Tensor, pull: Tensor) -> float:
    return math.sqrt(max(0.0, float((error * pull).sum(dtype=torch.float64))))


def root_of(gram: Tensor) -> Tensor:
    """Return C with C CT = G, from eigenvalues: G may be singular, and none is inverted. Of a block, that of the block.

    Diagonals stay (n,).
    """
    if gram.ndim == 1:
        return gram.sqrt()
    values, vectors = symmetric_eigen(gram.double())
    values = torch.where(values > _FLAT * values[-1], values, 0)
    return (vectors * values.sqrt()).to(gram.dtype)


def low_rank_in_metric(matrix: Tensor, rank: int, root: Tensor, *, seed: int = 0) -> Product:
    """Return the product of a rank that minimises tr(E G ET), exactly: the matrix projected on its leading outputs.

    root: of G, from root_of. ||(A - L) C|| is smallest when L = U UT A, U the leading left singular vectors of A C.
    """
    left = truncated_svd(times(matrix, root), rank, seed=seed)[0]
    return Product(left, left.T @ matrix)


def best_in_metric(matrix: Tensor, rank: int, gram: Tensor, *, seed: int = 0) -> Product:
    """Return what low_rank_in_metric does, by whichever of two ways is shorter: from G itself, or from its root.

    U are the leading eigenvectors of A G AT, too: (m, m), and smaller than G where outputs are fewer than inputs.
    """
    if gram.ndim == 1 or matrix.shape[0] > matrix.shape[1]:
        return low_rank_in_metric(matrix, rank, root_of(gram), seed=seed)
    wide = matrix.double()
    outputs = times(wide, gram.double()) @ wide.T
    left = symmetric_eigen((outputs + outputs.T) / 2)[1][:, -rank:].flip(1).to(matrix.dtype)
    return Product(left, left.T @ matrix)


def largest_eigenvalue(gram: Tensor) -> float:
    """Return the largest eigenvalue of G."""
    return float(gram.max()) if gram.ndim == 1 else float(symmetric_eigen(gram.double())[0][-1])


def alternate_in_metric(
    matrix: Tensor,
    gram: Tensor,
    part: Part,
    low_rank: Callable[[Tensor, Part], Part],
    *,
    count: int,
    rounds: int,
) -> tuple[Part, Tensor]:
    """Return low-rank and sparse part, each in turn the best that is found for the other; never worse than at first.

    gram: finite, at least one positive entry on the diagonal. part: to begin with. low_rank: (A - S, previous part) ->
    a part with a smaller error. count: of nonzeros in S, 0 < count < m n.
    """
    scale = scales_of(gram, matrix.shape[1])

    def keep(values: Tensor) -> Tensor:
        return keep_largest(values, count)

    sparse = keep((matrix - _dense(part, matrix)) * scale) / scale
    sparse = refit_on_support(matrix - _dense(part, matrix), sparse, gram, steps=_SOLVER_STEPS)
    best, lowest = (part, sparse), output_error(matrix - _dense(part, matrix) - sparse, gram)
    for _ in range(rounds):
        part = low_rank(matrix - sparse, part)
        target = matrix - _dense(part, matrix)
        sparse = _threshold_steps(target, sparse, keep, gram, scale)
        sparse = refit_on_support(target, sparse, gram, steps=_SOLVER_STEPS)
        error = output_error(target - sparse, gram)
        gained = lowest - error
        if gained > 0:
            best, lowest = (part, sparse), error
        if gained <= _SETTLED * lowest:
            break
    return best


def sparse_in_metric(target: Tensor, gram: Tensor, keep: Keep) -> Tensor:
    """Return the sparse matrix that is found to minimise tr(E G ET): its support is what ``keep`` leaves of values.

    At first those of A whose input is large as well, |A_ij| sqrt(G_jj): with a diagonal G nothing is better. Otherwise
    the support is moved as long as that lowers the error; least squares in the end.
    """
    target, scale = target.contiguous(), scales_of(gram, target.shape[1])
    sparse = torch.where(keep(target * scale) != 0, target, 0)
    if gram.ndim == 1:
        return sparse
    sparse = refit_on_support(target, sparse, gram, steps=_SOLVER_STEPS)
    best, lowest = sparse, output_error(target - sparse, gram)
    for _ in range(_SUPPORT_ROUNDS):
        sparse = _threshold_steps(target, sparse, keep, gram, scale)
        sparse = refit_on_support(target, sparse, gram, steps=_SOLVER_STEPS)
        error, before = output_error(target - sparse, gram), lowest
        if error < lowest:
            best, lowest = sparse, error
        if not before - error > _MOVED * before:
            break
    return refit_on_support(target, best, gram)


def _dense(part: Summand, like: Tensor) -> Tensor:
    dense = torch.zeros_like(like)
    part.add_to(dense, 1.0)
    return dense


def scales_of(gram: Tensor, fan_in: int) -> Tensor:
    """Return d (n,), in which all inputs count alike; those that are always zero count a little, to be divided by."""
    root = diagonal_of(gram, fan_in).clamp_min(0).sqrt()
    return root.clamp_min(1e-6 * float(root.max()))


def _threshold_steps(target: Tensor, sparse: Tensor, keep: Keep, gram: Tensor, scale: Tensor) -> Tensor:
    """Move the support: gradient steps in the scaled entries, each followed by keeping the largest.

    The step's length is the best one along the gradient on the present support; where it would raise the error it is
    halved, a few times at most.
    """
    pull = times(target - sparse, gram)  # E G: its size is the error, and it is the next slope
    error = _root_of_product(target - sparse, pull)
    for _ in range(_HARD_STEPS):
        slope = pull / scale
        inside = torch.where(sparse != 0, slope, 0)
        curvature = output_error(inside / scale, gram) ** 2
        length = float(inside.square().sum(dtype=torch.float64)) / curvature if curvature else 1.0
        for _ in range(4):
            moved = keep(sparse * scale + length * slope) / scale
            moved_pull = times(target - moved, gram)
            moved_error = _root_of_product(target - moved, moved_pull)
            if moved_error < error:
                break
            length /= 2
        else:
            break
        sparse, pull, error = moved, moved_pull, moved_error
    return sparse


def refit_on_support(target: Tensor, sparse: Tensor, gram: Tensor, *, steps: int = _MOST_SOLVER_STEPS) -> Tensor:
    """Return better values on the support of ``sparse``, never worse ones: conjugate gradients, all rows at one time.

    target: (m, n), finite, of moderate size. steps: at most; they end where the values have settled. Each row is a
    least-squares problem of its own, S[i, M] G[M, M] = (T G)[i, M]; they share every product with G.
    """
    support = sparse != 0
    if gram.ndim == 1:
        return torch.where(support, target, 0)
    scale = scales_of(gram, target.shape[1])
    start = output_error(target - sparse, gram)
    squared_error = start**2
    values, rest = sparse, torch.where(support, times(target - sparse, gram), 0)
    direction = preconditioned = rest / scale.square()
    squares = (rest * preconditioned).sum(dim=1, keepdim=True)
    flat = len(gram) * torch.finfo(target.dtype).eps
    for _ in range(steps):
        bent = torch.where(support, times(direction, gram), 0)
        curvature = (direction * bent).sum(dim=1, keepdim=True)
        # Along directions that no input has, only rounding noise would say how far to go: far.
        noise = flat * (direction * scale).square().sum(dim=1, keepdim=True)
        length = torch.where(curvature > noise, squares / curvature, 0)
        values = values + length * direction
        rest = rest - length * bent
        gain = float((length * squares).sum(dtype=torch.float64))
        squared_error -= gain
        if not gain > _SLIGHT * squared_error:
            break
        preconditioned = rest / scale.square()
        following = (rest * preconditioned).sum(dim=1, keepdim=True)
        direction = preconditioned + torch.where(squares > 0, following / squares, 0) * direction
        squares = following
    improved = bool(values.isfinite().all()) and output_error(target - values, gram) <= start
    return values if improved else sparse
