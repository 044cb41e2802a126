"""int4: half a byte for each value, and a scale for every 32 of them as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tcompress.encodings.base import INT4, FactorSpec, Levels, PartSpec, Place, Select, Values, require
from tcompress.errors import NumericalError

GROUP = 32
LEAST, MOST = -8, 7
_BLOCK = 2048  # groups at a time: what is computed of them stays in the cache
# Scales tried, as parts of the one that makes the largest magnitude -8. First that one; then those that make it 7 or
# -7, which clips nothing; then smaller ones, which are finer for the others and clip the largest.
_TRIED = (1.0, 8 / 7, -8 / 7, 0.96, 0.92, 0.87, -1.04)

_NIBBLES = np.arange(256, dtype=np.uint8)[:, None] >> np.array([0, 4], np.uint8) & 15
# The two values of each byte side by side, as one number of 64 bits, so that they are copied at once.
_PAIRS = ((_NIBBLES ^ 8).astype(np.float32) - 8).view(np.int64).reshape(256)


class Int4(Values):
    """Parts ``codes`` uint8, two to a byte, and ``scale`` float16: a value is code * scale, in float32.

    The first value of a byte is its low half; a code is a two's complement number of 4 bits.
    """

    name = "int4"
    part_names = ("codes", "scale")

    def parts(self, factor: FactorSpec, stored: tuple[int, ...]) -> dict[str, PartSpec] | None:
        if factor.dtype != INT4 or len(factor.shape) < 2:
            return None
        count = math.prod(stored)
        return {
            "codes": PartSpec(((count + 1) // 2,), torch.uint8),
            "scale": PartSpec((-(-count // GROUP),), torch.float16),
        }

    def encode(self, factor: Tensor, select: Select) -> dict[str, Tensor]:
        values = select(factor).reshape(-1)
        count = values.numel()
        groups = -(-count // GROUP)
        codes, scale = torch.zeros(groups * GROUP, dtype=torch.int8), torch.zeros(groups, dtype=torch.float16)
        for start in range(0, groups, _BLOCK):
            block = values[start * GROUP : (start + _BLOCK) * GROUP]
            padded = torch.zeros(-(-block.numel() // GROUP) * GROUP)
            padded[: block.numel()] = block
            best, found = _quantised(padded.reshape(-1, GROUP))
            scale[start : start + _BLOCK] = best
            codes[start * GROUP : (start + _BLOCK) * GROUP] = found.reshape(-1)
        if not bool(codes.any()) and bool(values.any()):
            raise NumericalError("its values are too small for int4's fp16 scales; int8 has float32 scales")
        return {"codes": _packed(codes[:count]), "scale": scale}

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], stored: tuple[int, ...], place: Place
    ) -> Tensor:
        codes, scale, count = parts["codes"], parts["scale"], math.prod(stored)
        require(len(shape) > 1, f"has codes, but its shape {shape} has no rows")
        right = codes.dtype == torch.uint8 and codes.shape == ((count + 1) // 2,)
        require(right, f"has not the codes of {count} values, two to a byte")
        groups = -(-count // GROUP)
        require(scale.dtype == torch.float16 and scale.shape == (groups,), f"has not {groups} scales in torch.float16")
        require(bool(scale.isfinite().all()), "has scales that are not finite")
        packed = codes.numpy()
        require(count % 2 == 0 or int(packed[-1]) >> 4 == 0, "has a code beyond its last value")
        values = np.zeros((groups, GROUP), dtype=np.float32)
        values.view(np.int64).reshape(-1)[: packed.size] = _PAIRS[packed]
        values *= scale.numpy().astype(np.float32)[:, None]
        return place(torch.from_numpy(values).reshape(-1)[:count])

    def levels(self, parts: Mapping[str, Tensor]) -> Levels:
        del parts
        return Levels(LEAST, MOST)

    def recoded(self, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "codes": _packed(codes.reshape(-1).to(torch.int8))}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], place: Place) -> Tensor:
        del shape
        codes, scale = parts["codes"], parts["scale"]
        missing = scale.numel() * (GROUP // 2) - codes.numel()
        values = _halves(F.pad(codes, (0, missing))).reshape(-1, GROUP).to(torch.float32)
        return place(values.mul_(scale.to(torch.float32)[:, None]).reshape(-1))


def _packed(codes: Tensor) -> Tensor:
    """Return int8 codes (count,) two to a byte, a last one alone in the low half."""
    halves = (F.pad(codes, (0, codes.numel() % 2)) & 15).view(torch.uint8).reshape(-1, 2)
    return halves[:, 0] | halves[:, 1] << 4


def _halves(packed: Tensor) -> Tensor:
    """Return the two codes of each byte as (bytes, 2) int8."""
    signed = packed.view(torch.int8)  # of which a shift to the right keeps the sign
    return torch.stack([signed << 4 >> 4, signed >> 4], dim=-1)


def _quantised(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return for (groups, 32) values the scales and codes of least squared error among those tried."""
    extreme = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True))
    best = (extreme / LEAST).to(torch.float16)
    if not bool(best.isfinite().all()):
        raise NumericalError("its values are too large for int4's fp16 scales; int8 has float32 scales")
    least = _squared_error(groups, best, _codes(groups, best))
    for part in _TRIED[1:]:
        best, least = _better(groups, (extreme * (part / LEAST)).to(torch.float16), best, least)
    codes = _codes(groups, best)
    fitted = (groups * codes).sum(dim=1, keepdim=True) / codes.square().sum(dim=1, keepdim=True).clamp_min(1)
    # The largest magnitude keeps a code of 7 or 8: by these the scale is found again when values are encoded again.
    found = fitted.to(torch.float16)
    is_found_again = _codes(extreme, found).abs() >= MOST
    best, _ = _better(groups, torch.where(is_found_again, found, best), best, least)
    return best.reshape(-1), _codes(groups, best).to(torch.int8)


def _better(groups: Tensor, scale: Tensor, best: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    error = _squared_error(groups, scale, _codes(groups, scale))
    wins = error < least  # never for a scale that is infinite, whose error is NaN
    return torch.where(wins, scale, best), torch.where(wins, error, least)


def _codes(groups: Tensor, scale: Tensor) -> Tensor:
    wide = scale.to(torch.float32)
    return (groups / torch.where(wide == 0, math.inf, wide)).round_().clamp_(LEAST, MOST)


def _squared_error(groups: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    return (codes * scale.to(torch.float32)).sub_(groups).square_().sum(dim=1, keepdim=True)
