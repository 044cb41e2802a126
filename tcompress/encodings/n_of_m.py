"""n:m: of every m neighbours of a row n are stored, and the number of their pattern.

Patterns are numbered as itertools.combinations(range(m), n) yields them. A group with fewer than n nonzeros stores
zeros too, those at its lowest positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Support, bits_of, require
from tcompress.encodings.masks import place_by_mask, scatter_by_mask, select_by_mask, single_bits

MOST = 16  # m: the mask of a group fits two bytes
_BLOCK = 1 << 16  # groups at a time: whole bytes, and a few MB of single bits

Masks = npt.NDArray[np.uint16]


class NOfM(Support):
    """Part ``patterns`` uint8: the numbers in as few bits as hold them all, lowest bit first, one after the other."""

    part_names = ("patterns",)

    def __init__(self, n: int, m: int) -> None:
        self.n, self.m = n, m
        self.name = f"{n}:{m}"
        self.bits = (math.comb(m, n) - 1).bit_length()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NOfM) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def stored(self, factor: FactorSpec) -> tuple[int, ...] | None:
        fits = factor.pattern == (self.n, self.m) and self._divides(factor.shape)
        return (self._groups(factor.shape) * self.n,) if fits else None

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        return {"patterns": PartSpec((self._bytes(factor.shape),), torch.uint8)}

    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        groups = bits_of(factor).reshape(-1, self.m).numpy() != 0
        masks = _packed(groups)
        _, filled, numbers = _tables(self.n, self.m)
        masks = filled[masks]
        assert masks.all(), "the factor has the pattern"  # noqa: S101
        patterns = torch.from_numpy(self._written(numbers[masks]))
        chosen = _unpacked(masks, self.m).reshape(-1)
        return {"patterns": patterns}, lambda tensor: select_by_mask(tensor, chosen)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        require(self._divides(shape), f"is {self.name}, but rows of its shape {shape} are not made of {self.m}")
        written = parts["patterns"]
        planned = (self._bytes(shape),)
        require(written.dtype == torch.uint8 and written.shape == planned, f"has not the patterns of {shape}")
        count = self._groups(shape)
        unused = -count * self.bits % 8
        data = written.contiguous().numpy()
        require(not unused or int(data[-1]) >> (8 - unused) == 0, "has bits beyond its last pattern")
        numbers = self._read(data, count)
        by_number, _, _ = _tables(self.n, self.m)
        require(not numbers.size or int(numbers.max()) < by_number.size, f"has a pattern that is none of {self.name}")
        masks = by_number[numbers]
        return (count * self.n,), lambda values: place_by_mask(values, _unpacked(masks, self.m).reshape(-1), shape)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        written, count = parts["patterns"], self._groups(shape)
        bits = single_bits(written)[: count * self.bits].reshape(count, self.bits)
        numbers = bits[:, 0].to(torch.int16)
        for place in range(1, self.bits):
            numbers |= bits[:, place].to(torch.int16) << place
        mask = _flags(self.n, self.m, written.device).index_select(0, numbers.to(torch.int32)).reshape(-1)
        return lambda values: scatter_by_mask(values, mask, shape)

    def _divides(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 0 and shape[-1] % self.m == 0

    def _groups(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) // self.m

    def _bytes(self, shape: tuple[int, ...]) -> int:
        return (self._groups(shape) * self.bits + 7) // 8

    def _written(self, numbers: Masks) -> npt.NDArray[np.uint8]:
        places = np.arange(self.bits, dtype=np.uint16)
        blocks = [
            np.packbits((numbers[start : start + _BLOCK, None] >> places & 1).astype(np.uint8), bitorder="little")
            for start in range(0, numbers.size, _BLOCK)
        ]
        return np.concatenate([np.empty(0, np.uint8), *blocks])

    def _read(self, data: npt.NDArray[np.uint8], count: int) -> Masks:
        numbers, each = np.zeros(count, dtype=np.uint16), _BLOCK // 8 * self.bits
        for start in range(0, count, _BLOCK):
            many = min(_BLOCK, count - start)
            first = start // 8 * self.bits
            bits = np.unpackbits(data[first : first + each], count=many * self.bits, bitorder="little")
            for place in range(self.bits):
                numbers[start : start + many] |= bits[place :: self.bits].astype(np.uint16) << np.uint16(place)
        return numbers


@lru_cache(maxsize=32)
def _tables(n: int, m: int) -> tuple[Masks, Masks, Masks]:
    """Return the mask of each pattern; of each mask the one filled up to n bits, 0 for too many; and its number."""
    by_number = np.array([sum(1 << place for place in places) for places in combinations(range(m), n)], np.uint16)
    every = np.arange(1 << m, dtype=np.uint16)
    set_bits = _unpacked(every, m).sum(axis=1)
    filled, missing = every.copy(), n - set_bits
    for place in range(m):
        free = (missing > 0) & (filled >> place & 1 == 0)
        filled[free] |= np.uint16(1 << place)
        missing -= free
    filled[missing < 0] = 0
    numbers = np.zeros(1 << m, dtype=np.uint16)
    numbers[by_number] = np.arange(by_number.size)
    return by_number, filled, numbers


def _flags(n: int, m: int, device: torch.device) -> Tensor:
    """Return the places of each pattern as (patterns, m) flags.

    Computed each time: a tensor kept from one call would not outlive a trace, nor follow a module to its device.
    """
    # The order of the combinations is that of falling numbers whose highest bit is the first place.
    falling = torch.arange((1 << m) - 1, -1, -1, dtype=torch.int32, device=device)
    flags = falling[:, None] >> torch.arange(m - 1, -1, -1, dtype=torch.int32, device=device) & 1
    patterns = (flags.sum(dim=1) != n).to(torch.uint8).argsort(stable=True)[: math.comb(m, n)]
    return flags.index_select(0, patterns).to(torch.bool)


def _packed(groups: npt.NDArray[np.bool_]) -> Masks:
    """Return the mask of each row of up to 16 flags, the first one in the lowest bit."""
    m = groups.shape[1]
    if m in {8, 16}:
        whole = np.packbits(groups, bitorder="little")
        return whole.astype(np.uint16) if m == 8 else whole.view("<u2").astype(np.uint16)
    masks = np.zeros(len(groups), dtype=np.uint16)
    for place in range(m):
        masks |= groups[:, place].astype(np.uint16) << np.uint16(place)
    return masks


def _unpacked(masks: Masks, m: int) -> npt.NDArray[np.bool_]:
    flags = np.empty((masks.size, m), dtype=np.bool_)
    for place in range(m):
        np.not_equal(masks & np.uint16(1 << place), 0, out=flags[:, place])
    return flags
