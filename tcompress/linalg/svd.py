"""Truncated singular value decompositions.

Letters: a matrix is (m, n), r = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncated_svd(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return left (m, r), values (r,) and right (r, n) of the best rank-r approximation (Eckart & Young 1936)."""
    del seed
    scale = matrix.abs().max()
    if scale == 0:
        scale = torch.ones_like(scale)
    left, values, right = torch.linalg.svd(matrix / scale, full_matrices=False)
    return left[:, :rank], values[:rank] * scale, right[:rank]


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values in float64, largest first: (min(m, n),)."""
    values: Tensor = torch.linalg.svdvals(matrix.double())
    return values


def rank_for_error(values: Tensor, relative_error: float) -> int:
    """Return the smallest rank whose relative Frobenius error is at most ``relative_error``."""
    if not values.any():
        return 0
    lost = (values / values[0]).square().flip(0).cumsum(0).flip(0)
    return int((lost > relative_error**2 * lost[0]).sum())
