"""The low-rank part of a low-rank plus sparse weight, whatever its format: how it starts, moves, and ends.

Letters: A = the weight as its matrix (out, fan_in); L, S = the low-rank and the sparse part; G as in
linalg.output_error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.formats.base import Factorization, Format, Shape, matrix_of
from tcompress.formats.svd import SVD
from tcompress.linalg.magnitude import keep_largest
from tcompress.linalg.output_error import (
    alternate_in_metric,
    largest_eigenvalue,
    low_rank_in_metric,
    root_of,
    scales_of,
    times,
)
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two
from tcompress.linalg.svd import truncated_svd
from tcompress.linalg.trimmed import Product, Summand, fit_trimmed, power_step, trimmed_error

FEW_ROUNDS = 5  # of an alternation that is not worth a good start


@dataclass(frozen=True)
class Refitted:
    """A part in any format: a factorization of A's shape, 2^exponent as large as the part."""

    found: Factorization
    exponent: int

    def add_to(self, matrix: Tensor, scale: float) -> None:
        dense = self.found.reconstruct().detach().reshape(matrix.shape)
        matrix.add_(_times_power(dense, -self.exponent), alpha=scale)


class Solver(ABC):
    """One low-rank format on weights of one shape. ``matrix`` and ``target`` are matrices of ``arranged``'s layout.

    exponent: all of them are 2^-exponent of the weight, so that squares stay within the range.
    """

    exponent = 0

    def scaled(self, matrix: Tensor) -> Tensor:
        """Return what the search works on for this arranged matrix, and remember by how much it is smaller."""
        scaled, self.exponent = scaled_to_unit(matrix)
        return scaled

    def arranged(self, weight: Tensor) -> Tensor:
        """Return the weight as the contiguous matrix that this solver works on."""
        return matrix_of(weight).contiguous()

    @abstractmethod
    def start(self, matrix: Tensor) -> Any:
        """Return the part that is fitted to the whole matrix."""

    def guess(self, matrix: Tensor) -> Any:
        """Return a part that is roughly the fitted one, if there is one that takes less time."""
        return self.start(matrix)

    @abstractmethod
    def project(self, target: Tensor, previous: Any) -> Any:
        """Return the part nearest to ``target``; ``previous`` is near it already."""

    @abstractmethod
    def in_metric(self, target: Tensor, previous: Any, gram: Tensor, root: Tensor) -> Any:
        """Return a part that lowers tr(E G ET) for E = target - part."""

    @abstractmethod
    def finish(self, part: Any) -> Factorization:
        """Return the part as a factorization of the weight's shape."""


class RefitSolver(Solver):
    """Fits the format anew at every step."""

    def __init__(self, setting: Format, shape: Shape) -> None:
        self.setting, self.shape = setting, shape
        self._steepest = 0.0

    def start(self, matrix: Tensor) -> Refitted:
        whole = _times_power(matrix, self.exponent)
        return Refitted(self.setting.fit(whole.reshape(self.shape)), self.exponent)

    def project(self, target: Tensor, previous: Refitted) -> Refitted:
        del previous
        return self.start(target)

    def in_metric(self, target: Tensor, previous: Refitted, gram: Tensor, root: Tensor) -> Refitted:
        del root
        # No closed form: a gradient step of the safe length, then the nearest part (majorisation-minimisation).
        self._steepest = self._steepest or largest_eigenvalue(gram)
        moved = torch.zeros_like(target)
        previous.add_to(moved, 1.0)
        return self.start(moved + times(target - moved, gram) / self._steepest)

    def finish(self, part: Refitted) -> Factorization:
        return part.found


class MatrixSolver(Solver):
    """The truncated SVD, of which a move is two products instead of a fit, and the best of a metric is known."""

    def __init__(self, setting: SVD, shape: Shape) -> None:
        self.setting, self.shape = setting, shape

    def arranged(self, weight: Tensor) -> Tensor:
        return self.setting.matrix(weight).contiguous()

    def start(self, matrix: Tensor) -> Product:
        left, values, right = truncated_svd(matrix, self.setting.rank, seed=self.setting.seed)
        return Product(left, values[:, None] * right)

    def guess(self, matrix: Tensor) -> Product:
        columns, rank = matrix.shape[1], min(self.setting.rank, *matrix.shape)
        random = torch.randn(rank, columns, generator=torch.Generator().manual_seed(self.setting.seed)).to(matrix)
        first = power_step(matrix, Product(matrix, random))
        return power_step(matrix, first)

    def project(self, target: Tensor, previous: Product) -> Product:
        return power_step(target, previous)

    def in_metric(self, target: Tensor, previous: Product, gram: Tensor, root: Tensor) -> Product:
        del previous, gram
        return low_rank_in_metric(target, self.setting.rank, root, seed=self.setting.seed)

    def finish(self, part: Product) -> Factorization:
        right = _times_power(part.right, self.exponent)
        return self.setting.from_product(self.shape, part.left, right)


def solver_for(setting: Format, shape: Shape, gram: Tensor | None = None) -> Solver:
    """Return the solver of a format; the moments of ``gram`` belong to columns that the spatial SVD does not have."""
    if isinstance(setting, SVD) and (gram is None or setting.matricisation == "channel" or len(shape) == 2):
        return MatrixSolver(setting, shape)
    return RefitSolver(setting, shape)


def fit_around(solver: Solver, weight: Tensor, left_out: Tensor, rounds: int) -> Factorization:
    """Return the low-rank part that ignores the entries in ``left_out``, booleans of the weight's shape.

    Hawkins et al. 2021, equations 13 and 14. What stands in these entries is never looked at.
    """
    outside = solver.arranged(left_out)
    matrix = solver.scaled(torch.where(outside, 0, solver.arranged(weight)))
    part = solver.start(matrix)
    return solver.finish(fit_trimmed(matrix, part, solver.project, rounds=rounds, left_out=outside))


def alternate(solver: Solver, weight: Tensor, count: int, rounds: int) -> Factorization:
    """Return the low-rank part that leaves the least beside the ``count`` largest entries of what it leaves."""
    matrix = solver.scaled(solver.arranged(weight))
    return solver.finish(_settled(solver, matrix, count, rounds))


def alternate_for_output(
    solver: Solver, weight: Tensor, gram: Tensor, count: int, rounds: int
) -> tuple[Factorization, Tensor]:
    """Return low-rank and sparse part, the latter (out, fan_in), with a small error of the layer's output."""
    matrix, root = solver.scaled(solver.arranged(weight)), root_of(gram)
    scale = scales_of(gram, matrix.shape[1])
    part = solver.start(matrix)
    if isinstance(solver, MatrixSolver):
        scaled = _settled(solver, matrix * scale, count, rounds)
        part = Product(scaled.left, scaled.right / scale)
        if gram.ndim == 1:
            sparse = keep_largest((matrix - part.left @ part.right) * scale, count) / scale
            return solver.finish(part), _times_power(sparse, solver.exponent)
    part, sparse = alternate_in_metric(
        matrix,
        gram,
        part,
        lambda target, previous: solver.in_metric(target, previous, gram, root),
        count=count,
        rounds=rounds,
    )
    return solver.finish(part), _times_power(sparse, solver.exponent)


def _times_power(values: Tensor, exponent: int) -> Tensor:
    if not exponent:
        return values
    found = times_power_of_two(values, exponent)
    if not found.isfinite().all():
        raise NumericalError(f"a value of a factor exceeds the range of {values.dtype}; scale the weight down")
    return found


def _settled(solver: Solver, matrix: Tensor, count: int, rounds: int) -> Any:
    if rounds <= FEW_ROUNDS:  # each of them moves the part as far as a better start would
        return fit_trimmed(matrix, solver.guess(matrix), solver.project, rounds=rounds, count=count)
    part = solver.start(matrix)
    # A few huge entries look like structure of low rank. Where removing them first leaves less, that is the start.
    rest = keep_largest(matrix, count)
    without: Summand = solver.start(torch.sub(matrix, rest, out=rest))
    del rest
    if trimmed_error(matrix, without, count) < trimmed_error(matrix, part, count):
        part = without
    return fit_trimmed(matrix, part, solver.project, rounds=rounds, count=count)
