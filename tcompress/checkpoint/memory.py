"""No tensor is built that this machine could not hold: a few bytes of factors may claim terabytes."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from tcompress.errors import SafetyError


def require_memory(shape: tuple[int, ...], dtype: torch.dtype, *, path: Path, tensor: str) -> None:
    """Raise SafetyError when a dense tensor of this shape would not fit into the machine's memory."""
    needed = math.prod(shape) * max(dtype.itemsize, 4)
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise SafetyError(
            f"claims a dense shape of {shape}, {needed} bytes; this machine has {available}", path=path, tensor=tensor
        )
