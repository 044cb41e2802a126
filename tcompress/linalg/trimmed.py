"""A low-rank fit that need not fit all entries: it leaves out those that a sparse part will hold anyway.

Letters: A = the matrix (m, n); L = its low-rank part; R = A - L; k = number of entries left out; d = k / (m n).

||R|| over the entries not left out is made small. Where these are fixed (Hawkins et al. 2021, equation 14) this is
matrix completion; where they are the k largest of R, it is the alternation of GoDec and OATS, L <- low rank of A - S,
S <- the k largest of A - L, written in L alone.

T. Zhou, D. Tao, "GoDec: randomized low-rank & sparse matrix decomposition in noisy case", 2011.
S. Zhang, V. Papyan, "OATS: outlier-aware pruning through sparse and low rank decomposition", 2025.
P. Jain, R. Meka, I. Dhillon, "Guaranteed rank minimization via singular value projection", 2010: the longer step.
B. O'Donoghue, E. Candes, "Adaptive restart for accelerated gradient schemes", 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tcompress.linalg.magnitude import threshold_of
from tcompress.linalg.scaling import scaled_to_unit

_BLOCK = 1 << 18  # values changed at one time: they stay in the cache from one operation to the next
_SETTLED = 1e-4  # of the error: gains that are smaller ...
_PATIENCE = 5  # ... over so many rounds end the search
_SHORTER = 0.7  # of the step's length, after one that was too long


class Summand(Protocol):
    """A low-rank part, in whatever form."""

    def add_to(self, matrix: Tensor, scale: float) -> None:
        """Add ``scale`` times the part to a matrix, in place."""


Part = TypeVar("Part", bound=Summand)


@dataclass(frozen=True)
class Product:
    """left (m, r) @ right (r, n)."""

    left: Tensor
    right: Tensor

    def add_to(self, matrix: Tensor, scale: float) -> None:
        matrix.addmm_(self.left, self.right, alpha=scale)


def power_step(matrix: Tensor, previous: Product) -> Product:
    """Return almost the best product of the rank for a matrix close to the one that ``previous`` was best for.

    One step of subspace iteration, two passes over the matrix, where a decomposition from nothing takes many: what it
    leaves out, the next round makes good.
    """
    right = scaled_to_unit(previous.right)[0]
    left = torch.linalg.qr(matrix @ right.T).Q
    return Product(left, left.T @ matrix)


def fit_trimmed(
    matrix: Tensor,
    start: Part,
    project: Callable[[Tensor, Part], Part],
    *,
    rounds: int,
    count: int = 0,
    left_out: Tensor | None = None,
) -> Part:
    """Return the low-rank part that fits a matrix best on the entries that are not left out.

    matrix: (m, n), contiguous. start: of the plain fit. project: (target, previous part) -> the low-rank part near
    ``target``. left_out: (m, n) booleans that fix the entries; without it they are the ``count`` largest of R,
    0 < count < m n. Memory: one matrix beside the given one, and what project takes.

    Every round is a gradient step for half the squared error on the entries that count, L + step R, projected. With
    a step of 1 that is the plain alternation, or expectation-maximisation. Only a part 1 - d of the entries pulls,
    so 1 / (1 - d) is the step that moves L as far as a full matrix would; it is taken from a point extrapolated
    along the last move (Nesterov 1983). Where the error rises the extrapolation starts anew, then steps become
    shorter, down to 1. The best part of those measured is returned: never worse than ``start``.
    """
    part = previous = start
    momentum = weight = 0.0
    step = 1 / (1 - (count / matrix.numel() if left_out is None else float(left_out.double().mean())))
    best, best_error, last_error = start, math.inf, math.inf
    lowest: list[float] = []
    fitted = torch.empty_like(matrix)
    for turn in range(rounds + 1):
        is_last = turn == rounds or (len(lowest) > _PATIENCE and lowest[-1] > (1 - _SETTLED) * lowest[-1 - _PATIENCE])
        momentum = 0.0 if is_last else momentum
        part.add_to(fitted.zero_(), 1 + momentum)
        if momentum:
            previous.add_to(fitted, -momentum)
        error = _to_target(matrix, fitted, count, left_out, step)
        if momentum == 0 and error < best_error:
            best, best_error = part, error
        if is_last:
            break
        lowest.append(min([error, *lowest[-1:]]))
        if error > last_error and momentum:
            momentum = weight = 0.0
            continue
        if error > last_error:
            step = max(1.0, _SHORTER * step)
        last_error = error
        previous, part = part, project(fitted, part)
        weight, momentum = _next_momentum(weight)
    return best


def trimmed_error(matrix: Tensor, part: Summand, count: int) -> float:
    """Return the norm of what a part leaves of a matrix, but for the ``count`` largest entries, 0 < count < m n."""
    fitted = torch.zeros_like(matrix)
    part.add_to(fitted, 1.0)
    return _to_target(matrix, fitted, count, None, 1.0)


def _next_momentum(weight: float) -> tuple[float, float]:
    """Return Nesterov's next weight, and how far to extrapolate."""
    weight = max(weight, 1.0)
    following = (1 + math.sqrt(1 + 4 * weight**2)) / 2
    return following, (weight - 1) / following


def _to_target(matrix: Tensor, fitted: Tensor, count: int, left_out: Tensor | None, step: float) -> float:
    """Turn L into the next target, L + step R on the entries that count, in place; return R's norm there."""
    values, flat = matrix.reshape(-1), fitted.reshape(-1)
    cut, equal = threshold_of(values, count, flat) if left_out is None else (0.0, 0)
    outs = [None] * math.ceil(flat.numel() / _BLOCK) if left_out is None else torch.split(left_out.reshape(-1), _BLOCK)
    squares, zero = 0.0, flat.new_zeros(())
    for original, fit, out in zip(torch.split(values, _BLOCK), torch.split(flat, _BLOCK), outs, strict=True):
        rest = original - fit
        # What hardshrink keeps are the entries above the cut; it takes a sixth of the time of torch.where.
        trimmed = rest - F.hardshrink(rest, cut) if out is None else torch.where(out, zero, rest)
        squares += float(torch.linalg.vector_norm(trimmed, dtype=torch.float64)) ** 2
        fit.add_(trimmed, alpha=step)
    # Entries equal to the threshold pull like the others, which of them do not cannot matter; their part is known.
    return math.sqrt(max(0.0, squares - equal * cut**2))
