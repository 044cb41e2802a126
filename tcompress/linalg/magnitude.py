"""Selection by magnitude: exact, deterministic under ties, with little memory beside the values.

Letters: n = number of values, k = number kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

COARSE_BINS = 1 << 16
_FINE_BITS = 15
_SIGNLESS = 0x7FFFFFFF
_BLOCK = 1 << 18  # values looked at at one time: they stay in the cache from one operation to the next


def keep_largest(values: Tensor, count: int) -> Tensor:
    """Return a copy of ``values`` with all but the ``count`` largest magnitudes set to zero.

    values: any shape, finite. Of equal magnitudes those that come first in row-major order are kept, so that exactly
    ``count`` survive and the same input gives the same support.
    """
    flat = values.detach().reshape(-1)
    if count >= flat.numel():
        return flat.clone().reshape(values.shape)
    kept = torch.zeros_like(flat)
    if count > 0:
        (threshold, ties), zero = _threshold(flat, count), flat.new_zeros(())
        for block, target in zip(torch.split(flat, _BLOCK), torch.split(kept, _BLOCK), strict=True):
            magnitude = block.abs()
            mask = magnitude >= threshold
            equal = magnitude == threshold
            found = int(equal.sum())
            if found > ties:
                mask[equal.nonzero()[ties:, 0]] = False
            ties = max(0, ties - found)
            torch.where(mask, block, zero, out=target)
    return kept.reshape(values.shape)


def _threshold(flat: Tensor, count: int) -> tuple[float, int]:
    """Return the ``count``-th largest magnitude, and how many that equal it are among the ``count`` largest."""
    # In place on one copy: torch.kthvalue would hold a 64-bit index beside every value.
    magnitude = flat.abs().cpu().numpy()
    magnitude.partition(magnitude.size - count)
    largest = magnitude[magnitude.size - count :]
    threshold = largest[0]
    return float(threshold), int(count - np.count_nonzero(largest > threshold))


def smallest_count_for_error(values: Tensor, relative_error: float) -> int:
    """Return the smallest number of values whose keeping leaves at most ``relative_error`` of the Frobenius norm.

    values: any shape, finite. Zeros are never counted, so an error of 0 gives the number of nonzeros.
    """
    magnitude = values.detach().abs().reshape(-1).cpu().numpy()
    magnitude.sort()
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
    return _counted((patterns >> _FINE_BITS for patterns in _patterns(values)), COARSE_BINS)


def fine_counts(values: Tensor, coarse_bin: int) -> Array:
    """Count the values of one coarse bin by the lower 15 bits of their magnitude: (32768,) int64."""
    inside = (patterns[patterns >> _FINE_BITS == coarse_bin] for patterns in _patterns(values))
    return _counted((patterns & ((1 << _FINE_BITS) - 1) for patterns in inside), 1 << _FINE_BITS)


def counts_around(values: Tensor, coarse_bin: int, fine_bin: int) -> tuple[int, int]:
    """Return how many magnitudes lie above the threshold that the two bins name, and how many are equal to it."""
    threshold = (coarse_bin << _FINE_BITS) | fine_bin
    found = [(int((p > threshold).sum()), int((p == threshold).sum())) for p in _patterns(values)]
    return sum(above for above, _ in found), sum(equal for _, equal in found)


def threshold_bin(counts: Array, count: int) -> tuple[int, int]:
    """Return the bin of the ``count``-th largest value (count >= 1), and how many values lie in bins above it."""
    from_above = counts[::-1].cumsum()
    position = int(np.searchsorted(from_above, count))
    return len(counts) - 1 - position, int(from_above[position] - counts[::-1][position])


def _patterns(values: Tensor) -> Iterator[Array]:
    """Yield the magnitudes' bit patterns block by block: int32, not negative."""
    for block in torch.split(values.detach().reshape(-1), _BLOCK):
        yield block.to(torch.float32).cpu().view(torch.int32).numpy() & _SIGNLESS


def _counted(blocks: Iterable[Array], size: int) -> Array:
    return sum((np.bincount(bins, minlength=size) for bins in blocks), start=np.zeros(size, dtype=np.int64))
