"""Norms and errors summed in float64, a block at a time: no copy of a weight is made for them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcompress.linalg.scaling import times_power_of_two

_BLOCK = 1 << 18  # values compared at one time: they stay in the cache from one operation to the next
_SQUARED_SAFELY = 1e140  # lengths up to this, and down to its inverse, are sums of squares that float64 holds
_NEAR_THE_END = 2.0**960  # of float64: norms of larger values may lie beyond it, of its inverse have fewer digits
_NEARER = 2.0**128  # ... and are measured so much nearer to one


def compare(weight: Tensor, rebuilt: Tensor) -> tuple[float, float]:
    """Return the Frobenius norm of a weight and the relative error of its reconstruction, both summed in float64.

    An all-zero weight has error 0 when it came back as it was, else infinity. A norm beyond float64 is infinite, its
    error is right all the same.
    """
    unit = _unit(weight)
    norms, losses = [], []
    for original, stored in zip(
        torch.split(weight.reshape(-1), _BLOCK), torch.split(rebuilt.reshape(-1), _BLOCK), strict=True
    ):
        # All in float64: differences rounded to float32 could make an error smaller than it is.
        exact = original.double() if unit == 1 else original / unit
        norms.append(_length(exact))
        losses.append(_length(exact - (stored.double() if unit == 1 else stored.double() / unit)))
    norm, lost = math.hypot(*norms), math.hypot(*losses)
    if norm == 0:
        return 0.0, 0.0 if lost == 0 else math.inf
    return unit * norm, lost / norm


def frobenius_norm(tensor: Tensor) -> float:
    """Return the Frobenius norm, summed in float64."""
    unit = _unit(tensor)
    blocks = torch.split(tensor.reshape(-1), _BLOCK)
    return unit * math.hypot(*(_length(block.double() if unit == 1 else block / unit) for block in blocks))


def _unit(weight: Tensor) -> float:
    """Return the power of two in which a weight is measured: 1 but for the ends of what float64 holds."""
    if weight.dtype != torch.float64 or weight.numel() == 0:
        return 1.0
    low, high = (float(bound) for bound in torch.aminmax(weight))
    largest = max(-low, high)
    if largest > _NEAR_THE_END:
        return _NEARER
    return 1 / _NEARER if 0 < largest < 1 / _NEAR_THE_END else 1.0


def _length(values: Tensor) -> float:
    """Return the length of float64 values of any range."""
    length = torch.linalg.vector_norm(values)
    if 1 / _SQUARED_SAFELY < float(length) < _SQUARED_SAFELY:
        return float(length)
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return largest
    exponent = math.frexp(largest)[1]
    return float(times_power_of_two(torch.linalg.vector_norm(times_power_of_two(values, -exponent)), exponent))
