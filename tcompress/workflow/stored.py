"""Factors as they lie on disk, and the weight that they give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.encodings import Coding, FactorSpec
from tcompress.formats import Format


@dataclass(frozen=True)
class StoredFactor:
    """One factor with the parts that will lie on disk; values: the CPU tensor that these parts give."""

    spec: FactorSpec
    coding: Coding
    parts: Mapping[str, Tensor]
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def rebuild(
    setting: Format,
    shape: tuple[int, ...],
    factors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the dense weight that stored factors give, as a CPU tensor of ``dtype``: what decompression writes.

    Raises FormatError when the factors do not make the shape.
    """
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    working = {name: factor.to(device=device, dtype=precision) for name, factor in factors.items()}
    with torch.no_grad():
        return setting.load(shape, working).reconstruct().detach().to(dtype).cpu()
