"""Selection by magnitude: exact, deterministic under ties, with little memory beside the values.

Letters: n = number of values, k = number kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

COARSE_BINS = 1 << 16
_FINE_BITS = 15
_SIGNLESS = 0x7FFFFFFF
_BLOCK = 1 << 20  # values that are squared or counted at one time


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Return a copy of ``values`` with all but the ``count`` largest magnitudes set to zero.

    values: any shape, finite. Of equal magnitudes those that come first in row-major order are kept, so that exactly
    ``count`` survive and the same input gives the same support.
    """
    values, n = values.contiguous(), values.numel()
    if count >= n:
        return values.clone()
    if count <= 0:
        return torch.zeros_like(values)
    # In place on one copy: torch.kthvalue would hold a 64-bit index beside every value.
    magnitude = values.detach().abs().reshape(-1).cpu().numpy()
    magnitude.partition(n - count)
    threshold = float(magnitude[n - count])
    del magnitude
    mask = (values > threshold) | (values < -threshold)
    missing = count - int(mask.sum())
    ties = ((values == threshold) | (values == -threshold)).reshape(-1).nonzero()[:missing, 0]
    mask.view(-1)[ties] = True
    return torch.where(mask, values, 0)


def smallest_count_for_error(values: Tensor, relative_error: float) -> int:
    """Return the smallest number of values whose keeping leaves at most ``relative_error`` of the Frobenius norm.

    values: any shape, finite. Zeros are never counted, so an error of 0 gives the number of nonzeros.
    """
    magnitude = np.sort(values.detach().abs().reshape(-1).cpu().numpy())
    if magnitude[-1] == 0:
        return 0
    blocks = [magnitude[start : start + _BLOCK] for start in range(0, magnitude.size, _BLOCK)]
    sums = np.array([_squares(block, magnitude[-1]).sum() for block in blocks])
    lost, allowed = 0.0, relative_error**2 * float(sums.sum())
    for index, block in enumerate(blocks):
        if lost + sums[index] > allowed:
            dropped = index * _BLOCK + int((lost + _squares(block, magnitude[-1]).cumsum() <= allowed).sum())
            return int(magnitude.size) - dropped
        lost += float(sums[index])
    return 0


def _squares(block: Array, scale: float) -> Array:
    """Squares in float64 of values over their largest: neither 1e38 nor 1e-38 leaves the range."""
    return np.square(block.astype(np.float64) / float(scale))


def coarse_counts(values: Tensor) -> Array:
    """Count values by the upper 16 of the 31 bits that a float32 magnitude has: (COARSE_BINS,) int64.

    As bit patterns, magnitudes of floats are ordered like integers, so a histogram of patterns finds any threshold
    exactly and in one pass over the values, whatever their range.
    """
    return _counted(_patterns(values) >> _FINE_BITS, COARSE_BINS)


def fine_counts(values: Tensor, coarse_bin: int) -> Array:
    """Count the values of one coarse bin by the lower 15 bits of their magnitude: (32768,) int64."""
    patterns = _patterns(values)
    return _counted(patterns[patterns >> _FINE_BITS == coarse_bin] & ((1 << _FINE_BITS) - 1), 1 << _FINE_BITS)


def counts_around(values: Tensor, coarse_bin: int, fine_bin: int) -> tuple[int, int]:
    """Return how many magnitudes lie above the threshold that the two bins name, and how many are equal to it."""
    threshold, patterns = (coarse_bin << _FINE_BITS) | fine_bin, _patterns(values)
    return int((patterns > threshold).sum()), int((patterns == threshold).sum())


def threshold_bin(counts: Array, count: int) -> tuple[int, int]:
    """Return the bin of the ``count``-th largest value (count >= 1), and how many values lie in bins above it."""
    from_above = counts[::-1].cumsum()
    position = int(np.searchsorted(from_above, count))
    return len(counts) - 1 - position, int(from_above[position] - counts[::-1][position])


def _patterns(values: Tensor) -> Array:
    return values.detach().to(torch.float32).cpu().contiguous().view(torch.int32).reshape(-1).numpy() & _SIGNLESS


def _counted(bins: Array, size: int) -> Array:
    blocks = (np.bincount(bins[start : start + _BLOCK], minlength=size) for start in range(0, bins.size, _BLOCK))
    return sum(blocks, start=np.zeros(size, dtype=np.int64))
