"""dense: every element is stored."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Support


class Dense(Support):
    """No parts: the values have the factor's shape."""

    name = "dense"
    part_names = ()

    def stored(self, factor: FactorSpec) -> tuple[int, ...]:
        return factor.shape

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        del factor
        return {}

    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        del factor
        return {}, lambda tensor: tensor

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        del parts
        return shape, lambda values: values.reshape(shape)

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        del parts
        return lambda values: values if values.shape == shape else values[: math.prod(shape)].reshape(shape)
