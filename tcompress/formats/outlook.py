"""What settings lose on one weight, told before any of them is fitted: one decomposition for each unfolding.

Whatever has rank r in an unfolding is at least as far from the weight as the best of rank r there (Eckart & Young
1936); truncations of several unfoldings leave out at most the sum (Oseledets 2011, theorem 2.2). Losses are squared
errors over the squared norm of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcompress.linalg.svd import left_out

_LARGEST = 192  # rows of an unfolding, or columns if they are fewer, that are decomposed: so many stand for all


@dataclass(frozen=True)
class Outlook:
    """loss: setting of the format -> what its fit will lose. is_exact: to the digits of the computation, not about."""

    loss: Callable[[Any], float]
    is_exact: bool


def of_unfoldings(unfoldings: Sequence[Tensor], ranks: Callable[[Any], Sequence[int]]) -> Outlook:
    """Return the outlook of a format whose weights have ``ranks(setting)`` in these unfoldings, (rows, columns) each.

    A loss is told as if the truncations left out parts that have nothing to do with each other: 1 - prod(1 - lost). It
    lies between the two bounds above.
    """
    lost = [(min(matrix.shape), left_out(_some_of(matrix))) for matrix in unfoldings]

    def loss(setting: Any) -> float:
        return 1 - math.prod(1 - _at(*each, rank) for each, rank in zip(lost, ranks(setting), strict=True))

    return Outlook(loss, is_exact=False)


def _at(size: int, lost: Tensor, rank: int) -> float:
    """Return what a rank leaves out; of some rows, what the same part of them as a rank does.

    That is how noise behaves, and spectra that fall as powers do; where the rank is low altogether, it tells too much.
    """
    looked_at = len(lost) - 1
    return float(lost[min(math.ceil(rank * looked_at / size), looked_at)])


def _some_of(matrix: Tensor) -> Tensor:
    """Return some rows and columns of a matrix large in both sizes, in the same proportion."""
    part = _LARGEST / min(matrix.shape)
    if part >= 1:
        return matrix
    rows, columns = (
        torch.linspace(0, size - 1, math.ceil(part * size), dtype=torch.float64).round().long() for size in matrix.shape
    )
    return matrix[rows][:, columns]
