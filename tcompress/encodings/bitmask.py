"""bitmask: the nonzero values in row-major order, and one bit per element that says where they belong."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Support, bits_of, require
from tcompress.encodings.masks import bits_set, place_by_mask, scatter_by_mask, select_by_mask, single_bits


class Bitmask(Support):
    """Part ``mask`` (ceil(elements / 8),) of bytes whose lowest bit comes first."""

    name = "bitmask"
    part_names = ("mask",)

    def stored(self, factor: FactorSpec) -> tuple[int, ...] | None:
        return None if factor.nonzeros is None else (factor.nonzeros,)

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        return {"mask": PartSpec((_mask_bytes(factor.values),), torch.uint8)}

    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        mask = bits_of(factor).reshape(-1).numpy() != 0
        packed = torch.from_numpy(np.packbits(mask, bitorder="little"))
        return {"mask": packed}, lambda tensor: select_by_mask(tensor, mask)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        mask, count = parts["mask"], math.prod(shape)
        require(mask.dtype == torch.uint8 and mask.shape == (_mask_bytes(count),), f"has no bit for each of {shape}")
        packed = mask.contiguous().numpy()
        require(count % 8 == 0 or int(packed[-1]) >> count % 8 == 0, "has bits beyond its last element")

        def place(values: Tensor) -> Tensor:
            return place_by_mask(values, np.unpackbits(packed, count=count, bitorder="little").view(np.bool_), shape)

        return (bits_set(packed),), place

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        mask = single_bits(parts["mask"])[: math.prod(shape)]
        return lambda values: scatter_by_mask(values, mask, shape)


def _mask_bytes(count: int) -> int:
    return (count + 7) // 8
