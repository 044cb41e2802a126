"""int3: three bits for each value, a scale for every 32 of them as they are stored, and an offset before these.

Codes are signs and magnitudes, and none of them need be zero: what pruning has left has no values near zero, and codes
spent there are lost. With offset c the magnitudes are c, c + 1, c + 2 and c + 3 times the scale. c = 1/2 is the usual
grid without a zero, best for normal values; of what stays of these at a density of 0.3, c = 2.5 has half the error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tcompress.encodings.base import INT3, FactorSpec, Levels, PartSpec, Place, Select, Values, require
from tcompress.encodings.masks import single_bits
from tcompress.errors import NumericalError

GROUP = 32
LARGEST = 3
_BITS = 3
_BLOCK = 2048  # groups at a time: what is computed of them stays in the cache
_ACCIDENTAL = 1000  # one stored value in so many may be zero, and gets the smallest magnitude that there is
_LOOKED_AT = 256  # groups, at most, by which the offset is chosen
# Multiples of a quarter, so that the largest value over its scale is exact, and found again as it was.
_OFFSETS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
# Scales tried, as parts of the one that makes the largest magnitude the largest code; smaller ones clip it.
_TRIED = (1.0, 0.89, 0.79)
_CLIPPED = 0.5  # codes by which a fitted scale may clip the largest magnitude: it keeps its code


class Int3(Values):
    """Parts ``codes`` uint8 (3, ceil(values / 8)) and ``scale`` float16, of which the first is the offset.

    Row 0 of the codes has the sign, set for a negative value, rows 1 and 2 the lower and upper bit of k, the lowest bit
    of a byte first: a value is +-(k + offset) * scale, in float32.
    """

    name = "int3"
    part_names = ("codes", "scale")

    def parts(self, factor: FactorSpec, stored: tuple[int, ...]) -> dict[str, PartSpec] | None:
        if factor.dtype != INT3 or len(factor.shape) < 2:
            return None
        count = math.prod(stored)
        return {
            "codes": PartSpec((_BITS, -(-count // 8)), torch.uint8),
            "scale": PartSpec((1 + -(-count // GROUP),), torch.float16),
        }

    def encode(self, factor: Tensor, select: Select) -> dict[str, Tensor]:
        values = select(factor).reshape(-1)
        count = values.numel()
        groups = _grouped(values.abs())
        offset = _offset_of(values, groups)
        scale, codes = torch.zeros(len(groups), dtype=torch.float16), torch.zeros(groups.shape, dtype=torch.int8)
        for start in range(0, len(groups), _BLOCK):
            block = slice(start, start + _BLOCK)
            scale[block], codes[block] = _quantised(groups[block], offset)
        if bool(values.any()) and not bool(scale.any()):
            raise NumericalError("its values are too small for int3's fp16 scales; int8 has float32 scales")
        magnitudes = codes.reshape(-1)[:count]
        scales = torch.cat([torch.tensor([offset], dtype=torch.float16), scale])
        return {"codes": _packed(values < 0, magnitudes), "scale": scales}

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], stored: tuple[int, ...], place: Place
    ) -> Tensor:
        codes, scales, count = parts["codes"], parts["scale"], math.prod(stored)
        require(len(shape) > 1, f"has codes, but its shape {shape} has no rows")
        right = codes.dtype == torch.uint8 and codes.shape == (_BITS, -(-count // 8))
        require(right, f"has not the codes of {count} values, in three rows of bits")
        groups = -(-count // GROUP)
        right = scales.dtype == torch.float16 and scales.shape == (1 + groups,)
        require(right, f"has not an offset and {groups} scales in torch.float16")
        require(bool(scales.isfinite().all()), "has an offset or scales that are not finite")
        require(float(scales[0]) >= 0, "has an offset that is negative")
        spare = codes[:, -1] >> count % 8 if count % 8 else codes[:0]
        require(not bool(spare.any()), "has codes beyond its last value")
        bits = np.unpackbits(codes.contiguous().numpy(), axis=1, bitorder="little").reshape(_BITS, -1)[:, :count]
        numbers = np.zeros((groups, GROUP), dtype=np.uint8)
        numbers.reshape(-1)[:count] = bits[0] << 2 | bits[2] << 1 | bits[1]
        values = _magnitudes(scales).numpy()[numbers]
        values *= scales[1:].numpy().astype(np.float32)[:, None]
        return place(torch.from_numpy(values).reshape(-1)[:count])

    def levels(self, parts: Mapping[str, Tensor]) -> Levels:
        return Levels(-LARGEST - 1, LARGEST + 1, 1 - float(parts["scale"][0]), first=1)

    def single_steps(self, parts: Mapping[str, Tensor], stored: tuple[int, ...]) -> Mapping[str, Tensor]:
        codes = _packed(torch.zeros(math.prod(stored), dtype=torch.bool), torch.ones(math.prod(stored)))
        scales = parts["scale"].clone()
        scales[0] = 0
        return {**parts, "codes": codes, "scale": scales}

    def recoded(self, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        signed = codes.reshape(-1)
        return {**parts, "codes": _packed(signed < 0, (signed.abs() - 1).clamp_min(0))}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], place: Place) -> Tensor:
        del shape
        codes, scale = parts["codes"], parts["scale"][1:]
        bits = single_bits(codes.reshape(-1)).reshape(_BITS, 8 * codes.shape[1]).to(torch.int32)
        bits = F.pad(bits, (0, scale.numel() * GROUP - bits.shape[1]))
        magnitudes = _magnitudes(parts["scale"]).index_select(0, bits[0] << 2 | bits[2] << 1 | bits[1])
        return place((magnitudes.reshape(-1, GROUP) * scale.to(torch.float32)[:, None]).reshape(-1))


def _magnitudes(scales: Tensor) -> Tensor:
    """Return the eight values at a scale of one, those of sign 1 last."""
    positive = torch.arange(LARGEST + 1, dtype=torch.float32, device=scales.device) + scales[:1]
    return torch.cat([positive, -positive])


def _packed(negative: Tensor, magnitudes: Tensor) -> Tensor:
    """Return signs and magnitudes (count,) as three rows of bits."""
    numbers = magnitudes.to(torch.uint8).numpy()
    rows = np.stack([negative.numpy(), numbers & 1, numbers >> 1])
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little").reshape(_BITS, -(-numbers.size // 8)))


def _grouped(values: Tensor) -> Tensor:
    """Return magnitudes (count,) as (groups, 32): those of the last group again and again, until it is full."""
    tail = values[values.numel() // GROUP * GROUP :]
    again = tail.repeat(-(-GROUP // max(1, tail.numel())))[: -values.numel() % GROUP]
    return torch.cat([values, again]).reshape(-1, GROUP)


def _offset_of(values: Tensor, groups: Tensor) -> float:
    """Return the offset of least squared error; 0 where zeros are more than an accident, and have to stay it.

    Zeros are counted in the values: of those of the last group, which fill it up, there are several in ``groups``.
    """
    count = values.numel()
    if count == 0 or (count - int(values.count_nonzero())) * _ACCIDENTAL > count:
        return 0.0
    some = groups
    if len(groups) > _LOOKED_AT:
        some = groups[torch.linspace(0, len(groups) - 1, _LOOKED_AT, dtype=torch.float64).round().long()]
    errors = [float(_least_error(some, offset).sum()) for offset in _OFFSETS]
    return _OFFSETS[int(np.argmin(errors))]


def _least_error(groups: Tensor, offset: float) -> Tensor:
    scales = (_scaled_down(groups, offset, part) for part in _TRIED)
    return torch.stack([_squared_error(groups, scale, offset) for scale in scales]).amin(dim=0)


def _quantised(groups: Tensor, offset: float) -> tuple[Tensor, Tensor]:
    """Return for (groups, 32) magnitudes the scales and k of least squared error among those tried."""
    best = _scaled_down(groups, offset, 1.0)
    if not bool(best.isfinite().all()):
        raise NumericalError("its values are too large for int3's fp16 scales; int8 has float32 scales")
    least = _squared_error(groups, best, offset)
    for part in _TRIED[1:]:
        best, least = _better(groups, _scaled_down(groups, offset, part), offset, best, least)
    levels = _codes(groups, best, offset) + offset
    fitted = (groups * levels).sum(dim=1, keepdim=True) / levels.square().sum(dim=1, keepdim=True).clamp_min(1e-9)
    # The largest magnitude keeps the largest code: by it the scale is found again when the values are encoded again.
    most = groups.amax(dim=1, keepdim=True) / (LARGEST + offset - _CLIPPED)
    fitted = torch.where(fitted < most, fitted, best.to(torch.float32)).to(torch.float16)
    best, _ = _better(groups, fitted, offset, best, least)
    return best.reshape(-1), _codes(groups, best, offset).to(torch.int8)


def _scaled_down(groups: Tensor, offset: float, part: float) -> Tensor:
    return (groups.amax(dim=1, keepdim=True) * (part / (LARGEST + offset))).to(torch.float16)


def _better(groups: Tensor, scale: Tensor, offset: float, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    error = _squared_error(groups, scale, offset)
    wins = error < least  # never for a scale that is infinite, whose error is NaN
    return torch.where(wins, scale, best), torch.where(wins, error, least)


def _codes(groups: Tensor, scale: Tensor, offset: float) -> Tensor:
    wide = scale.to(torch.float32)
    return (groups / torch.where(wide == 0, math.inf, wide)).sub_(offset).round_().clamp_(0, LARGEST)


def _squared_error(groups: Tensor, scale: Tensor, offset: float) -> Tensor:
    near = _codes(groups, scale, offset).add_(offset).mul_(scale.to(torch.float32))
    return near.sub_(groups).square_().sum(dim=1, keepdim=True)
