"""How layers are computed and stored, whatever becomes of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tcompress.checkpoint.layers import Layer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Settings:
    """How layers are computed and stored: ``store`` None keeps each layer's own type."""

    store: torch.dtype | None = None
    device: torch.device = CPU
    allow_nonfinite: bool = False

    def stored_type(self, layer: Layer) -> torch.dtype:
        """Return the type in which the layer's factors are stored."""
        own = layer.dtype.torch
        assert own is not None, "layers are of floating types"  # noqa: S101
        return self.store or own
