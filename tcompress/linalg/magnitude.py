"""Selection by magnitude: exact, deterministic under ties, with little memory beside the values.

Letters: n = number of values, k = number kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]

COARSE_BINS = 1 << 16
_FINE_BITS = 15
_SIGNLESS = 0x7FFFFFFF
_SAMPLES = (1 << 13, 1 << 16)  # values, at least and at most; in between one in so many:
_SAMPLED = 32
_GOLDEN = (math.sqrt(5) - 1) / 2
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
        threshold, ties = threshold_of(flat, count)
        for block, target in zip(torch.split(flat, _BLOCK), torch.split(kept, _BLOCK), strict=True):
            torch.hardshrink(block, threshold, out=target)  # keeps what is above, exactly
            equal = _places_of(block.abs(), threshold)[:ties]
            target[equal] = block[equal]
            ties -= len(equal)
    return kept.reshape(values.shape)


def _places_of(magnitude: Tensor, threshold: float) -> Tensor:
    if magnitude.is_cuda:
        return (magnitude == threshold).nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(magnitude.numpy() == threshold))


def keep_in_groups(matrix: Tensor, count: int, size: int) -> Tensor:
    """Return a copy with all but the ``count`` largest magnitudes of every ``size`` neighbours in a row set to zero.

    matrix: (rows, columns), columns a multiple of ``size``; of equal magnitudes those that come first are kept.
    """
    groups = matrix.detach().reshape(-1, size)
    order = groups.abs().sort(dim=1, descending=True, stable=True).indices
    kept = torch.zeros_like(groups)
    places = order[:, :count]
    return kept.scatter_(1, places, groups.gather(1, places)).reshape(matrix.shape)


def threshold_of(flat: Tensor, count: int, minus: Tensor | None = None) -> tuple[float, int]:
    """Return the ``count``-th largest magnitude, and how many that equal it are among the ``count`` largest.

    flat: (n,), finite; 1 <= count <= n. minus: (n,), what is to be subtracted from it first.

    A sample says between which two magnitudes the threshold lies, one pass counts what is above and collects what is
    between (Floyd & Rivest 1975): sorting all values would take several times longer, and a copy of them.
    """
    bounds = _bounds(flat, count, minus)
    if bounds is not None:
        above, between = 0, []
        others = [None] * math.ceil(flat.numel() / _BLOCK) if minus is None else torch.split(minus, _BLOCK)
        for block, other in zip(torch.split(flat, _BLOCK), others, strict=True):
            magnitude = block.abs() if other is None else (block - other).abs_()
            larger, inside = _above_and_between(magnitude, *bounds)
            above += larger
            between.append(inside)
        inside = torch.cat(between)
        if above < count <= above + inside.numel():
            return _partitioned(inside, count - above)
    return _partitioned(flat.abs() if minus is None else (flat - minus).abs_(), count)


def _above_and_between(magnitude: Tensor, low: float, high: float) -> tuple[int, Tensor]:
    """Return how many magnitudes are above ``high``, and those from ``low`` to ``high``."""
    if magnitude.is_cuda:
        return int((magnitude > high).sum()), magnitude[(magnitude >= low) & (magnitude <= high)]
    values = magnitude.numpy()  # NumPy counts and finds in a third of torch's time
    places = np.flatnonzero((values >= low) & (values <= high))
    return int(np.count_nonzero(values > high)), torch.from_numpy(values[places])


def _bounds(flat: Tensor, count: int, minus: Tensor | None) -> tuple[float, float] | None:
    """Return two magnitudes that have the threshold between them, as far as a sample can tell."""
    size = min(max(flat.numel() // _SAMPLED, _SAMPLES[0]), _SAMPLES[1])
    if flat.numel() < _SAMPLED * size:
        return None
    # Multiples of the golden ratio spread evenly and keep no step that rows or columns of a matrix could share.
    spread = (torch.arange(size, dtype=torch.float64) * _GOLDEN).frac() * flat.numel()
    places = spread.to(flat.device, torch.int64)
    sample = flat[places] if minus is None else flat[places] - minus[places]
    magnitude = sample.abs_().cpu().numpy()
    expected, room = count / flat.numel() * size, 4 * math.sqrt(size) / 2
    first, last = math.floor(expected - room), math.ceil(expected + room)  # from the largest down
    pivots = [size - 1 - place for place in (first, last) if 0 <= place < size]
    magnitude.partition(pivots)
    high = math.inf if first < 0 else float(magnitude[size - 1 - first])
    low = 0.0 if last >= size else float(magnitude[size - 1 - last])
    return low, high


def _partitioned(magnitude: Tensor, count: int) -> tuple[float, int]:
    # In place on one copy: torch.kthvalue would hold a 64-bit index beside every value.
    values = magnitude.cpu().numpy()
    values.partition(values.size - count)
    largest = values[values.size - count :]
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


def inside_bin(values: Tensor, coarse_bin: int) -> tuple[Array, Array]:
    """Return the different magnitudes in one coarse bin, rising, as the lower 15 bits of their patterns; and how often.

    (u,) int32 and (u,) int64: u is at most 32768, however many values there are.
    """
    inside = (patterns[patterns >> _FINE_BITS == coarse_bin] for patterns in _patterns(values))
    counts = _counted((patterns & ((1 << _FINE_BITS) - 1) for patterns in inside), 1 << _FINE_BITS)
    fine = np.flatnonzero(counts).astype(np.int32)
    return fine, counts[fine]


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
