"""One pass over the weights before any work: are they finite, and how many of them are zero?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.workflow.progress import Progress, silent, steps

_BLOCK = 1 << 18  # values looked at at one time: they stay in the cache


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a weight beyond its shape."""

    nonfinite: int
    nonzeros: int


def survey(checkpoint: Checkpoint, layers: Sequence[Layer], *, progress: Progress = silent) -> dict[str, Facts]:
    """Return the facts of each layer, by name."""
    return {layer.name: facts_of(checkpoint.read(layer.name)) for layer in steps("reading", layers, progress)}


def facts_of(weight: Tensor) -> Facts:
    """Count the values that are NaN or infinite, and those that are not zero."""
    nonfinite = nonzeros = 0
    for block in torch.split(weight.reshape(-1), _BLOCK):
        # One sum passes over the block once; only a block that holds something not finite is looked at more closely.
        if not math.isfinite(float(block.sum(dtype=torch.float64))):
            nonfinite += block.numel() - int(torch.isfinite(block).sum())
        nonzeros += int(torch.count_nonzero(block))
    return Facts(nonfinite, nonzeros)
