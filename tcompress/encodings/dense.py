"""dense: the tensor as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tcompress.encodings.base import Encoding, FactorSpec, PartSpec, require


class Dense(Encoding):
    """One part without a name of its own: the factor itself."""

    name = "dense"

    def parts(self, factor: FactorSpec) -> Mapping[str, PartSpec]:
        return {"": PartSpec(factor.shape, factor.dtype)}

    def encode(self, factor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        return {"": factor}

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        require(tuple(parts[""].shape) == shape, f"has shape {tuple(parts[''].shape)}, declared is {shape}")
        return parts[""]
