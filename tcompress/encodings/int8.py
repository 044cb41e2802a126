"""int8: a whole number for each value, and a scale for each row."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tcompress.encodings.base import FactorSpec, Levels, PartSpec, Place, Select, Values, require
from tcompress.errors import NumericalError

LARGEST = 127
_BLOCK = 1 << 17  # values at a time: what is computed of them stays in the cache


class Int8(Values):
    """Parts ``codes`` int8, -127..127, and ``scale`` float32 (rows,): a value is code * scale, in float32."""

    name = "int8"
    part_names = ("codes", "scale")

    def parts(self, factor: FactorSpec, stored: tuple[int, ...]) -> dict[str, PartSpec] | None:
        if factor.dtype != torch.int8 or len(factor.shape) < 2:
            return None
        return {"codes": PartSpec(stored, torch.int8), "scale": PartSpec(factor.shape[:1], torch.float32)}

    def encode(self, factor: Tensor, select: Select) -> dict[str, Tensor]:
        columns = math.prod(factor.shape[1:])
        rows = factor.reshape(factor.shape[0], columns)
        codes, scale = torch.zeros(rows.shape, dtype=torch.int8), torch.zeros(len(rows))
        step = max(1, _BLOCK // max(1, columns))
        for start in range(0, len(rows) if columns else 0, step):
            block = rows[start : start + step]
            found = scale[start : start + step] = block.abs().amax(dim=1) / LARGEST
            divisor = torch.where(found == 0, math.inf, found)
            codes[start : start + step] = (block / divisor[:, None]).round_().clamp_(-LARGEST, LARGEST)
        if not bool(scale.isfinite().all()):
            raise NumericalError("its values are not finite")
        if not bool(codes.any()) and bool(rows.any()):
            raise NumericalError("its values are too small for int8's fp32 scales")
        return {"codes": select(codes.reshape(factor.shape)), "scale": scale}

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], stored: tuple[int, ...], place: Place
    ) -> Tensor:
        codes, scale = parts["codes"], parts["scale"]
        require(len(shape) > 1, f"has codes, but its shape {shape} has no rows")
        require(codes.dtype == torch.int8, "has codes that are not torch.int8")
        require(tuple(codes.shape) == stored, f"has codes of shape {tuple(codes.shape)} for places of {stored}")
        require(not bool((codes < -LARGEST).any()), f"has codes below -{LARGEST}")
        right = scale.dtype == torch.float32 and scale.shape == shape[:1]
        require(right, f"has not {shape[0]} scales in torch.float32")
        sound = bool(scale.isfinite().all()) and not bool((scale < 0).any())
        require(sound, "has scales that are negative or not finite")
        return _scaled(place(codes), scale)

    def levels(self, parts: Mapping[str, Tensor]) -> Levels:
        del parts
        return Levels(-LARGEST, LARGEST)

    def recoded(self, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        return {**parts, "codes": codes.to(torch.int8)}

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], place: Place) -> Tensor:
        del shape
        return _scaled(place(parts["codes"]), parts["scale"])


def _scaled(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.to(torch.float32).mul_(scale.reshape(-1, *[1] * (codes.ndim - 1)))
