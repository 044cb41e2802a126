"""Values as they are, in the factor's own type."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Values, require, value_type


class Plain(Values):
    """Part ``values``."""

    name = None
    part_names = ("values",)

    def parts(self, factor: FactorSpec, stored: tuple[int, ...]) -> dict[str, PartSpec]:
        return {"values": PartSpec(stored, value_type(factor.dtype))}

    def encode(self, factor: Tensor, select: Select) -> dict[str, Tensor]:
        return {"values": select(factor)}

    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], stored: tuple[int, ...], place: Place
    ) -> Tensor:
        del shape
        values = parts["values"]
        require(tuple(values.shape) == stored, f"has values of shape {tuple(values.shape)} for places of {stored}")
        return place(values)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], place: Place) -> Tensor:
        del shape
        return place(parts["values"])
