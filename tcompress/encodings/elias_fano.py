"""elias-fano:l: the nonzero values in row-major order, and their positions in about 2 + log2(1 / density) bits each.

The l lowest bits of each position stand as they are; the rest, which never falls from one position to the next, in
unary: a one for each value, after as many zeros in all as its upper part says. That is within 0.56 bits a value of what
any code needs for such a set, and how many bytes it takes is known from how many values there are.

P. Elias, "Efficient storage and retrieval by content and address of static files", 1974; R. Fano, 1971.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Support, bits_of, require
from tcompress.encodings.masks import Positions, bits_set, place_at, scatter_at, select_at, single_bits

NAME = "elias-fano"
MOST_LOW = 48  # bits of a position that stand as they are: beyond any file's number of elements


class EliasFano(Support):
    """Part ``positions`` uint8: l rows of ceil(nonzeros / 8) bytes, one for each bit, the lowest first; then ``high``.

    Bit p_i / 2^l + i of ``high`` is set for the i-th position p_i. The lowest bit of a byte comes first.
    """

    part_names = ("positions",)

    def __init__(self, low: int) -> None:
        """low: l, which the name on disk says."""
        self.low = low
        self.name = f"{NAME}:{low}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EliasFano) and self.low == other.low

    def __hash__(self) -> int:
        return hash(self.name)

    def stored(self, factor: FactorSpec) -> tuple[int, ...] | None:
        return None if factor.nonzeros is None else (factor.nonzeros,)

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        return {"positions": PartSpec((self.nbytes(factor.values, factor.nonzeros or 0),), torch.uint8)}

    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        positions = np.flatnonzero(bits_of(factor).reshape(-1).numpy())
        rows = positions >> np.arange(self.low)[:, None] & 1
        high = np.zeros(8 * _high_bytes(factor.numel(), positions.size, self.low), dtype=np.bool_)
        high[(positions >> self.low) + np.arange(positions.size)] = True
        packed = [np.packbits(bits, bitorder="little") for bits in (*rows.astype(np.bool_), high)]
        return {"positions": torch.from_numpy(np.concatenate(packed))}, lambda tensor: select_at(tensor, positions)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        part, elements = parts["positions"], math.prod(shape)
        require(part.dtype == torch.uint8 and part.ndim == 1, "has positions that are no plain list of bytes")
        low, high = self._rows(part, elements)
        upper = high.numpy()
        count = bits_set(upper)
        require(self.nbytes(elements, count) == len(part), f"has not the bits of {count} positions in {shape}")
        positions = _positions(low.contiguous().numpy(), upper, count)
        rising = bool((np.diff(positions) > 0).all())
        require(rising and (count == 0 or int(positions[-1]) < elements), "has positions that fall, or beyond its last")
        spare = low[:, -1] >> count % 8 if self.low and count % 8 else low[:0]
        require(not bool(spare.any()), "has bits beyond its last position")
        return (count,), lambda values: place_at(values, positions, shape)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        elements = math.prod(shape)
        low, high = self._rows(parts["positions"], elements)
        ones = single_bits(high)

        def place(values: Tensor) -> Tensor:
            # One entry more than there are values: the zeros, which own none, all write there.
            many = values.numel()
            ranks = ones.cumsum(0).sub_(1)
            upper = torch.full((many + 1,), -1, device=ones.device)
            at = torch.arange(ones.numel(), device=ones.device)
            upper.scatter_(0, ranks.masked_fill(~ones, many), at - ranks)
            upper = upper[:-1]
            positions = torch.where(upper < 0, elements, (upper << self.low) + _lower(low, many))
            return scatter_at(values, positions, shape)

        return place

    def nbytes(self, elements: int, count: int) -> int:
        """Bytes of the positions of so many values."""
        return self.low * _bytes(count) + _high_bytes(elements, count, self.low)

    def _rows(self, part: Tensor, elements: int) -> tuple[Tensor, Tensor]:
        """Return the low bits in rows and the high ones; where they begin is told by the length alone.

        A row has n bytes for 8 n - 7 to 8 n positions, and the high bits then n + c bytes, with at most two whole
        numbers for c, of which one at most goes with n: all together is (l + 1) n + c. An impossible length gives some.
        """
        upper = max(elements - 1, 0) >> self.low
        constants = (_bytes(max(upper - 7, 0)), _bytes(upper))
        widths = ((len(part) - c) // (self.low + 1) for c in constants if (len(part) - c) % (self.low + 1) == 0)
        width = max(0, next(widths, 0)) if self.low else 0
        end = self.low * width
        return part[:end].reshape(self.low, width), part[end:]


def best_low_bits(elements: int, count: int) -> int:
    """Return the l that takes the fewest bytes, of equal ones the smallest."""
    return min(range(min(elements.bit_length(), MOST_LOW) + 1), key=lambda low: EliasFano(low).nbytes(elements, count))


def _positions(low: np.ndarray, high: np.ndarray, count: int) -> Positions:
    positions = np.flatnonzero(np.unpackbits(high, bitorder="little").view(np.bool_)) - np.arange(count)
    positions <<= len(low)
    for bit, row in enumerate(low):
        positions |= np.unpackbits(row, count=count, bitorder="little").astype(np.int64) << bit
    return positions


def _lower(low: Tensor, many: int) -> Tensor:
    """Return the low bits of so many positions, zero beyond those that there are, by torch operations alone."""
    if not len(low):
        return torch.zeros(many, dtype=torch.int64, device=low.device)
    rows = single_bits(low.reshape(-1)).reshape(len(low), -1)[:, :many]
    found = torch.zeros(rows.shape[1], dtype=torch.int64, device=low.device)
    for bit in range(len(low)):
        found += rows[bit].to(torch.int64) << bit
    return F.pad(found, (0, many - rows.shape[1]))


def _high_bytes(elements: int, count: int, low: int) -> int:
    return _bytes(count + ((elements - 1) >> low)) if count else 0


def _bytes(bits: int) -> int:
    return (bits + 7) // 8
