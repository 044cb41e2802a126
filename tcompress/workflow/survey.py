"""One pass over the weights before any work: are they finite, and how many of them are zero?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.settings import Settings

_BLOCK = 1 << 18  # values looked at at one time: they stay in the cache


@dataclass(frozen=True)
class Facts:
    """What a plan must know of a weight beyond its shape."""

    nonfinite: int
    nonzeros: int

    @property
    def flaw(self) -> str | None:
        """Why nothing can be fitted to the weight; None where something can."""
        if not self.nonfinite:
            return None
        return f"holds {self.nonfinite} value{' that is' if self.nonfinite == 1 else 's that are'} NaN or Inf"


def survey(checkpoint: Checkpoint, layers: Sequence[Layer], *, progress: Progress = silent) -> dict[str, Facts]:
    """Return the facts of each layer, by name."""
    return {layer.name: facts_of(checkpoint.read(layer.name)) for layer in steps("reading", layers, progress)}


def refuse_nonfinite(checkpoint: Checkpoint, facts: Mapping[str, Facts], settings: Settings) -> None:
    """Raise NumericalError, which names the first, for layers with NaN or Inf, unless they may stay dense."""
    flaws = [(name, found.flaw) for name, found in facts.items() if found.flaw is not None]
    if flaws and not settings.allow_nonfinite:
        more = f" (and {len(flaws) - 1} more layers)" if len(flaws) > 1 else ""
        problem = f"{flaws[0][1]}{more}; --allow-nonfinite leaves such layers dense"
        raise NumericalError(problem, path=checkpoint.path, tensor=flaws[0][0])


def facts_of(weight: Tensor) -> Facts:
    """Count the values that are NaN or infinite, and those that are not zero."""
    nonfinite = nonzeros = 0
    for block in torch.split(weight.reshape(-1), _BLOCK):
        # One sum passes over the block once; only a block that holds something not finite is looked at more closely.
        if not math.isfinite(float(block.sum(dtype=torch.float64))):
            nonfinite += block.numel() - int(torch.isfinite(block).sum())
        nonzeros += int(torch.count_nonzero(block))
    return Facts(nonfinite, nonzeros)
