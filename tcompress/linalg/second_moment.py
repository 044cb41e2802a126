"""The second moment of a stream of vectors, block by block.

Letters: x = a vector (n,), a row of what is added; G = E[x xT], (n, n), or its diagonal (n,); N = vectors so far.

Products are formed in float32, or float64 where the vectors are, and summed in float64: the rounding of a block does
not grow with their number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_FULL = 4096  # inputs of a layer above which the diagonal alone is kept: 8 n² bytes would be 134 MB and more
_ROWS = 8192  # of a block: summed in float32, more would lose digits
_MIRRORED = 512  # rows at a time


@dataclass(frozen=True)
class Moment:
    """What a stream of ``count`` vectors was like. second: G, float64; mean: (n,), float64; diagonal: of G only."""

    second: Tensor
    mean: Tensor
    count: int
    diagonal: bool


class SecondMoment:
    """Sums of x xT and of x in float64, on the CPU.

    full: G is wanted whole. storage: zeros of float64 to sum x xT in, (n, n) or (n,), where memory is not the place.
    """

    def __init__(self, n: int, *, full: bool, storage: Tensor | None = None) -> None:
        shape = (n, n) if full else (n,)
        self._products = torch.zeros(shape, dtype=torch.float64) if storage is None else storage
        assert tuple(self._products.shape) == shape  # noqa: S101
        self._sum = torch.zeros(n, dtype=torch.float64)
        self._count = 0

    def add(self, rows: Tensor) -> None:
        """Take in vectors, (positions, n), of any floating type and on any device."""
        for piece in torch.split(rows, _ROWS):
            block = piece if piece.dtype == torch.float64 else piece.float()
            full = self._products.ndim == 2
            products = block.T @ block if full else block.square().sum(dim=0, dtype=torch.float64)
            self._products.add_(products.cpu())
            self._sum.add_(block.sum(dim=0, dtype=torch.float64).cpu())
        self._count += len(rows)

    def finish(self) -> Moment:
        """Return the moment, exactly symmetric, in the storage of the sums: nothing can be added any more."""
        count = max(self._count, 1)
        self._products.div_(count)
        if self._products.ndim == 2:
            _mirror(self._products)
        return Moment(self._products, self._sum.div_(count), self._count, self._products.ndim == 1)


def _mirror(matrix: Tensor) -> None:
    """Replace a matrix by the mean of itself and its transpose, a few rows at a time."""
    for start in range(0, len(matrix), _MIRRORED):
        rows = slice(start, start + _MIRRORED)
        mean = (matrix[rows, start:] + matrix[start:, rows].T) / 2
        matrix[rows, start:] = mean
        matrix[start:, rows] = mean.T
