"""Values between zeros: taken out and put back through a mask of one bit per element, or through their positions.

What is named scatter does by torch operations alone, on any device, what is named place does faster by NumPy's.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcompress.encodings.base import bits_of

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Positions = npt.NDArray[np.integer]

_BLOCK = 1 << 18  # elements at a time: their positions stay in the cache, which is what makes them fast
BITS_SET = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)  # bits set in each byte


def bits_set(packed: Bytes) -> int:
    """Count the bits set."""
    return int(np.bincount(packed, minlength=256) @ BITS_SET)


def select_by_mask(tensor: Tensor, mask: Mask) -> Tensor:
    """Return the elements where the mask, one for each element in row-major order, is set."""
    bits = bits_of(tensor).reshape(-1).numpy()
    chosen = np.empty(np.count_nonzero(mask), dtype=bits.dtype)
    end = 0
    for block in range(0, mask.size, _BLOCK):
        positions = np.flatnonzero(mask[block : block + _BLOCK])
        start, end = end, end + positions.size
        np.take(bits[block : block + _BLOCK], positions, out=chosen[start:end])
    return torch.from_numpy(chosen).view(tensor.dtype)


def select_at(tensor: Tensor, positions: Positions) -> Tensor:
    """Return the elements at these row-major positions."""
    return torch.from_numpy(bits_of(tensor).reshape(-1).numpy()[positions]).view(tensor.dtype)


def place_by_mask(values: Tensor, mask: Mask, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of a shape with the values where the mask is set, which is at as many places."""
    bits = bits_of(values).numpy()
    dense = np.zeros(mask.size, dtype=bits.dtype)
    end = 0
    for block in range(0, mask.size, _BLOCK):
        positions = np.flatnonzero(mask[block : block + _BLOCK])
        start, end = end, end + positions.size
        dense[block : block + _BLOCK][positions] = bits[start:end]
    return torch.from_numpy(dense).view(values.dtype).reshape(shape)


def place_at(values: Tensor, positions: Positions, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of a shape with the values at these row-major positions."""
    bits = bits_of(values).numpy()
    dense = np.zeros(math.prod(shape), dtype=bits.dtype)
    dense[positions] = bits
    return torch.from_numpy(dense).view(values.dtype).reshape(shape)


def single_bits(packed: Tensor) -> Tensor:
    """Return the bits of bytes as booleans, the lowest bit of each byte first, by torch operations alone."""
    byte, place = (torch.arange(size, dtype=torch.uint8, device=packed.device) for size in (256, 8))
    # The eight flags of each byte side by side, as one number of 64 bits, so that they are copied at once.
    flags = (byte[:, None] >> place & 1).view(torch.int64).reshape(256)
    return flags.index_select(0, packed.to(torch.int32)).view(torch.bool)


def scatter_by_mask(values: Tensor, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of a shape with the first values where the mask, one for each element, is set."""
    return values.new_zeros(math.prod(shape)).masked_scatter_(mask, values).reshape(shape)


def scatter_at(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return zeros of a shape with the first values at these row-major positions; one beyond the last is no place."""
    spare = values.new_zeros(math.prod(shape) + 1)
    return spare.index_copy_(0, positions, values[: positions.numel()])[:-1].reshape(shape)
