"""Norms and errors summed in float64, a block at a time: no copy of a weight is made for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BLOCK = 1 << 18  # values compared at one time: they stay in the cache from one operation to the next


def compare(weight: Tensor, rebuilt: Tensor) -> tuple[float, float]:
    """Return the Frobenius norm of a weight and the relative error of its reconstruction, both summed in float64.

    An all-zero weight has error 0 when it came back as it was, else infinity.
    """
    scale = _scale(weight)
    total = lost = 0.0
    for original, stored in zip(
        torch.split(weight.reshape(-1), _BLOCK), torch.split(rebuilt.reshape(-1), _BLOCK), strict=True
    ):
        # All in float64: differences rounded to float32 could make an error smaller than it is.
        exact = original.double() / scale
        total += float(torch.linalg.vector_norm(exact)) ** 2
        exact -= stored.double() / scale
        lost += float(torch.linalg.vector_norm(exact)) ** 2
    norm = math.sqrt(total)
    if norm == 0:
        return 0.0, 0.0 if lost == 0 else math.inf
    return scale * norm, math.sqrt(lost) / norm


def _scale(weight: Tensor) -> float:
    """Return what float64 values are divided by before they are squared; squares of float32 stay within float64."""
    if weight.dtype != torch.float64:
        return 1.0
    low, high = (float(bound) for bound in torch.aminmax(weight))
    return max(-low, high) or 1.0


def frobenius_norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, summed in float64."""
    scale = _scale(tensor)
    blocks = torch.split(tensor.reshape(-1), _BLOCK)
    return scale * math.sqrt(sum(float(torch.linalg.vector_norm(block.double() / scale)) ** 2 for block in blocks))
