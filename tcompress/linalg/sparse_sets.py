"""Sets of sparse matrices of Frobenius norm 1, and the nearest member of each: what a sparse factor is projected on.

Letters: p, q = rows and columns of the matrix; k = entries kept of one row or column; T = total of nonzeros aimed at.

A projection is called with a matrix (p, q), real or complex, and returns a new one; zero is its own projection.
Decisions are taken on magnitudes rounded to 2^-33 of the largest, and of equal ones the first index wins: matrices
like Hadamard's are all ties, and rounding errors deciding them would leave supports without any structure.

L. Le Magoarou, R. Gribonval, "Flexible multilayer sparse approximations of matrices and applications", 2016: the sets.
L. Giffon, S. Ayache, H. Kadri, T. Artieres, R. Sicre, "PSM-nets: compressing neural networks with product of sparse
matrices", 2021: so many entries of every row and of every column, which leaves none of them empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Projection = Callable[[Tensor], Tensor]

_LEVELS = 2.0**33  # of magnitude that are told apart: about ten decimals; times 2^30 indices they fit 64 bits


@dataclass(frozen=True)
class LargestPerRowAndColumn:
    """Keeps the largest ``per_row`` entries of every row together with the largest ``per_column`` of every column."""

    per_row: int
    per_column: int

    @staticmethod
    def of_total(total: int, rows: int, columns: int) -> LargestPerRowAndColumn:
        """Share ``total`` out evenly over the rows, and once more over the columns, as PSM-nets do."""
        return LargestPerRowAndColumn(total // rows, total // columns)

    def most_nonzeros(self, rows: int, columns: int) -> int:
        """Return how many nonzeros no projected matrix exceeds: what rows and columns choose, if they never agree."""
        return min(rows * columns, rows * min(self.per_row, columns) + columns * min(self.per_column, rows))

    def __call__(self, matrix: Tensor) -> Tensor:
        levels = _magnitude_levels(matrix)
        kept = _largest_of_rows(levels, self.per_row) | _largest_of_rows(levels.T, self.per_column).T
        return _unit_norm(torch.where(kept, matrix, 0))


@dataclass(frozen=True)
class LargestPerColumn:
    """Keeps the ``count`` largest entries of every column."""

    count: int

    def __call__(self, matrix: Tensor) -> Tensor:
        kept = _largest_of_rows(_magnitude_levels(matrix).T, self.count).T
        return _unit_norm(torch.where(kept, matrix, 0))


@dataclass(frozen=True)
class LargestEntries:
    """Keeps the ``count`` largest entries, wherever they stand."""

    count: int

    def __call__(self, matrix: Tensor) -> Tensor:
        kept = _largest_of_rows(_magnitude_levels(matrix).reshape(1, -1), self.count).reshape(matrix.shape)
        return _unit_norm(torch.where(kept, matrix, 0))


@dataclass(frozen=True, eq=False)  # tensors have no truth value to compare by
class FixedSupport:
    """Keeps the entries where ``support`` is true: (p, q) bool."""

    support: Tensor

    def __call__(self, matrix: Tensor) -> Tensor:
        return _unit_norm(torch.where(self.support, matrix, 0))


@dataclass(frozen=True)
class Level:
    """One split of a residual: the sets of the factor that is split off and of what remains, and the size between."""

    factor: Projection
    residual: Projection
    between: int


def default_count(rows: int, columns: int) -> int:
    """floor(log2) of the larger size, as in PSM-nets; at least 1."""
    return max(1, max(rows, columns).bit_length() - 1)


def full_nonzeros(rows: int, columns: int) -> int:
    """Return the fewest nonzeros per row and column with which no set excludes any matrix."""
    return min(rows, columns)


def sparse_product_levels(rows: int, columns: int, nonzeros: int, count: int) -> list[Level]:
    """Return the splits of PSM-nets: ``nonzeros`` s of every row and column, residuals of which half is left each time.

    The matrix is taken as wide (A, B), A <= B. A residual is given A B / 2^(k+1) entries after split k, but never
    fewer than the s B that the last one keeps: where ``count`` is small its last step is longer than a halving.
    """
    small, large = sorted((rows, columns))
    inner = LargestPerRowAndColumn(nonzeros, nonzeros)
    last = nonzeros * large
    totals = [max(last, (small * large) >> (k + 1)) for k in range(count - 2)] + [last]
    return [Level(inner, LargestPerRowAndColumn.of_total(total, small, large), small) for total in totals[: count - 1]]


def last_set(rows: int, columns: int, nonzeros: int) -> LargestPerRowAndColumn:
    """Return the set of the factor that has the larger size, of the matrix taken as wide."""
    small, large = sorted((rows, columns))
    return LargestPerRowAndColumn.of_total(nonzeros * large, small, large)


def sparse_product_nonzeros(rows: int, columns: int, nonzeros: int, count: int) -> list[tuple[tuple[int, int], int]]:
    """Return shape and most nonzeros of each factor that sparse_product returns: known before, grows with nonzeros."""
    small, large = sorted((rows, columns))
    inner = LargestPerRowAndColumn(nonzeros, nonzeros).most_nonzeros(small, small)
    outer = last_set(rows, columns, nonzeros).most_nonzeros(small, large)
    if rows <= columns:
        return [((small, small), inner)] * (count - 1) + [((small, large), outer)]
    return [((large, small), outer)] + [((small, small), inner)] * (count - 1)


def hadamard_levels(d: int) -> list[Level]:
    """Two entries per row and column of log2(d) factors: what the fast Walsh-Hadamard transform has. d: power of 2."""
    halves = [d >> (i + 1) for i in range(d.bit_length() - 2)]
    return [Level(LargestPerRowAndColumn(2, 2), LargestPerRowAndColumn(half, half), d) for half in halves]


def butterfly_levels(d: int) -> list[Level]:
    """Return the fixed supports of log2(d) butterflies, the widest first. d: power of 2."""
    return _butterflies(d, torch.arange(d))[:-1]


def dft_levels(d: int) -> list[Level]:
    """Return the supports of Cooley and Tukey's transform: log2(d) butterflies and the bit reversal. d: power of 2."""
    order, bits = torch.arange(d), d.bit_length() - 1
    return _butterflies(d, sum(((order >> bit & 1) << (bits - 1 - bit) for bit in range(bits)), start=0 * order))


def _butterflies(d: int, order: Tensor) -> list[Level]:
    """Return log2(d) splits; butterfly ``bit`` joins indices that differ in no other; the rest differ below it."""
    i, j = torch.arange(d)[:, None], torch.arange(d)
    levels = []
    for bit in range(d.bit_length() - 2, -1, -1):
        joined = (i == j) | (i ^ j == 1 << bit)
        rest = i >> bit == order >> bit
        levels.append(Level(FixedSupport(joined), FixedSupport(rest), d))
    return levels


def rectangular_levels(
    rows: int, count: int, per_column: int, nonzeros: int, *, decay: float = 0.8, first: float = 1.4
) -> list[Level]:
    """Return the splits of pyfaust's "rectmat", for residuals on the left, of a matrix with ``rows`` <= columns.

    The right-most factor keeps ``per_column`` of every column, the others ``nonzeros`` * rows in all, residual i
    first * decay^i * rows^2.
    """
    factors: list[Projection] = [LargestPerColumn(per_column), *[LargestEntries(nonzeros * rows)] * (count - 2)]
    totals = [math.ceil(first * rows**2 * decay**i) for i in range(count - 1)]
    return [Level(factor, LargestEntries(total), rows) for factor, total in zip(factors, totals, strict=True)]


def _magnitude_levels(matrix: Tensor) -> Tensor:
    """Return the magnitudes as integers from 0 to _LEVELS: (p, q) int64."""
    magnitude = matrix.abs()
    largest = float(magnitude.max())
    if largest == 0:
        return torch.zeros(matrix.shape, dtype=torch.int64, device=matrix.device)
    return magnitude.div_(largest).mul_(_LEVELS).round_().to(torch.int64)


def _largest_of_rows(levels: Tensor, count: int) -> Tensor:
    """Return where the ``count`` largest of each row stand, of equal ones the first: (p, q) bool."""
    columns = levels.shape[1]
    if count <= 0 or count >= columns:
        return torch.full_like(levels, count > 0, dtype=torch.bool)
    # The index below the level makes keys distinct, so that a threshold selects exactly ``count`` of them.
    keys = levels.contiguous() * columns
    keys -= torch.arange(columns, device=levels.device)
    is_few = 2 * count <= columns
    if is_few:
        threshold = keys.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        return keys >= threshold
    threshold = keys.topk(columns - count, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    return keys > threshold


def _unit_norm(matrix: Tensor) -> Tensor:
    """Scale ``matrix`` in place."""
    norm = float(torch.linalg.vector_norm(matrix))
    return matrix.div_(norm) if norm > 0 else matrix
