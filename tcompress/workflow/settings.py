"""How layers are computed and stored, whatever becomes of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tcompress.checkpoint.layers import Layer
from tcompress.encodings import INT3, INT4

CPU = torch.device("cpu")
# The types that factors are stored in, by their names on the command line and in plans.
STORED_TYPES: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "int8": torch.int8,
    "int4": INT4,
    "int3": INT3,
}
TYPE_NAMES = {dtype: name for name, dtype in STORED_TYPES.items()}


@dataclass(frozen=True)
class Settings:
    """How layers are computed and stored: ``store`` None keeps each layer's own type.

    joint_as_asked: whether layers that a plan fits as one are that also where factors of their own would fit better.
    """

    store: torch.dtype | None = None
    device: torch.device = CPU
    allow_nonfinite: bool = False
    joint_as_asked: bool = False

    def stored_type(self, layer: Layer) -> torch.dtype:
        """Return the type in which the layer's factors are stored."""
        own = layer.dtype.torch
        assert own is not None, "layers are of floating types"  # noqa: S101
        return self.store or own

    def storing(self, store: torch.dtype | None) -> Settings:
        """Return these settings with another stored type, if one is given."""
        return self if store is None else replace(self, store=store)
