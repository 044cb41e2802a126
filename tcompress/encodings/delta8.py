"""delta8: the nonzero values in row-major order, and how many zeros stand before each of them.

A byte 0..254 is the number of zeros between a value and the one before it (or the beginning). A byte 255 stands for
255 zeros and belongs to no value: the next byte goes on counting. Zeros after the last value have no byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Support, bits_of, require
from tcompress.encodings.masks import Positions, place_at, scatter_at, select_at

SKIP = 255


class Delta8(Support):
    """Part ``gaps`` (nonzeros + skips,) uint8."""

    name = "delta8"
    part_names = ("gaps",)

    def stored(self, factor: FactorSpec) -> tuple[int, ...] | None:
        return None if factor.nonzeros is None else (factor.nonzeros,)

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        nonzeros = factor.nonzeros or 0
        # All zeros together hold so many whole skips; cutting them into runs only loses some.
        most = (factor.values - nonzeros) // SKIP if nonzeros else 0
        skips = most if factor.skips is None else factor.skips
        return {"gaps": PartSpec((nonzeros + skips,), torch.uint8)}

    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        positions = np.flatnonzero(bits_of(factor).reshape(-1).numpy())
        zeros = gaps_between(positions)
        skips, rest = zeros // SKIP, (zeros % SKIP).astype(np.uint8)
        gaps = np.full(positions.size + int(skips.sum()), SKIP, dtype=np.uint8)
        gaps[np.arange(positions.size) + np.cumsum(skips)] = rest
        return {"gaps": torch.from_numpy(gaps)}, lambda tensor: select_at(tensor, positions)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        gaps = parts["gaps"]
        require(gaps.dtype == torch.uint8 and gaps.ndim == 1, "has gaps that are no plain list of bytes")
        steps = gaps.numpy()
        require(steps.size == 0 or int(steps[-1]) != SKIP, "has a gap after its last value")
        owned = steps != SKIP
        ends = np.cumsum(steps + owned.astype(np.int64))[owned]  # one more than the position of each value
        require(ends.size == 0 or int(ends[-1]) <= math.prod(shape), "has gaps that reach beyond its last element")
        return (ends.size,), lambda values: place_at(values, ends - 1, shape)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        gaps = parts["gaps"]

        def place(values: Tensor) -> Tensor:
            # One entry more than there are values: the bytes that own none all write there.
            many, elements = values.numel(), math.prod(shape)
            positions = torch.full((many + 1,), elements, device=gaps.device)
            owned = gaps != SKIP
            ranks = owned.cumsum(0).sub_(1).masked_fill_(~owned, many)
            positions.scatter_(0, ranks, (gaps + owned).cumsum(0).sub_(1))
            return scatter_at(values, positions[:-1], shape)

        return place


def gaps_between(positions: Positions) -> Positions:
    """Return the zeros before each of these rising positions, counted from the one before it."""
    return np.diff(positions, prepend=-1) - 1
