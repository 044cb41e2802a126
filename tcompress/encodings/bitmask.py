"""bitmask: the nonzero values in row-major order, and one bit per element that says where they belong."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from tcompress.encodings.base import BITS, Encoding, FactorSpec, PartSpec, bits_of, require


class Bitmask(Encoding):
    """Parts ``values`` (nonzeros,) and ``mask`` (ceil(elements / 8),) of bytes whose lowest bit comes first."""

    name = "bitmask"

    def parts(self, factor: FactorSpec) -> Mapping[str, PartSpec] | None:
        if factor.nonzeros is None:
            return None
        return {
            "values": PartSpec((factor.nonzeros,), factor.dtype),
            "mask": PartSpec((_mask_bytes(factor.values),), torch.uint8),
        }

    def encode(self, factor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        bits = bits_of(factor).reshape(-1).numpy()
        support = bits != 0
        values = torch.from_numpy(bits[support]).view(factor.dtype)
        return {"values": values, "mask": torch.from_numpy(np.packbits(support, bitorder="little"))}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        values, mask = parts["values"], parts["mask"]
        count = math.prod(shape)
        require(values.ndim == 1, "has values that are no plain list")
        require(mask.dtype == torch.uint8 and mask.shape == (_mask_bytes(count),), f"has no bit for each of {shape}")
        support = np.unpackbits(mask.numpy(), bitorder="little").view(bool)
        require(not support[count:].any(), "has bits beyond its last element")
        support = support[:count]
        require(
            int(support.sum()) == values.numel(),
            f"has {values.numel()} values, but its mask has another number of bits set",
        )
        dense = np.zeros(count, dtype=_numpy_bits(values))
        dense[support] = bits_of(values).numpy()
        return torch.from_numpy(dense).view(values.dtype).reshape(shape)


def _mask_bytes(count: int) -> int:
    return (count + 7) // 8


def _numpy_bits(values: torch.Tensor) -> np.dtype[np.generic]:
    return torch.empty(0, dtype=BITS[values.dtype.itemsize]).numpy().dtype
