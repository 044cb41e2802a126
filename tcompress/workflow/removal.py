"""What is left of a layer's values when its low-rank part is taken away (low-rank-plus-sparse paper, figure 6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import Format
from tcompress.formats.svd import SVD
from tcompress.workflow.fitting import working_copy
from tcompress.workflow.plan import Target
from tcompress.workflow.planning import find_setting
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.settings import CPU, Settings
from tcompress.workflow.survey import facts_of

BINS = 101  # odd: zero lies in the middle of a bin
_SHARE = 0.1  # of the weight's values, as in the paper
_WIDEST = 5  # root mean squares: what lies beyond would leave the middle too few bins
_FLAT = 1e-6  # of the limit: values that differ by nothing but rounding have no shape to speak of
_BLOCK = 1 << 20
_PLAIN = ("svd", "tt", "ttm", "tucker", "cp")


@dataclass(frozen=True)
class Values:
    """How values are spread: counts per bin, and the excess kurtosis (None where all are the same)."""

    counts: tuple[int, ...]
    kurtosis: float | None


@dataclass(frozen=True)
class Removal:
    """The values of a layer before and after its low-rank part is removed, in the same bins over -limit..limit.

    The outermost bins hold what lies beyond as well. A layer that nothing fits has only a ``reason``.
    """

    layer: Layer
    format: Format | None = None
    relative_error: float = 1.0
    limit: float = 0.0
    before: Values = field(default=Values((), None))
    after: Values = field(default=Values((), None))
    reason: str | None = None


def low_rank_of(choices: Sequence[Format | Target] | None) -> Target:
    """Return what removes the low-rank part: the first low-rank format asked for, or svd, at a tenth of the values."""
    for choice in choices or ():
        format_type = choice.format if isinstance(choice, Target) else type(choice)
        if format_type.name in _PLAIN:
            options = choice.options if isinstance(choice, Target) else choice.options()
            sizes = format_type.amounts()
            kept = {name: value for name, value in options.items() if name not in sizes}
            return Target(format_type, kept, keep=_SHARE)
    return Target(SVD, keep=_SHARE)


def removals(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    low_rank: Target | None = None,
    *,
    device: torch.device = CPU,
    progress: Progress = silent,
) -> Iterator[Removal]:
    """Yield what removing the low-rank part does to each layer's values, one layer in memory at a time."""
    low_rank = low_rank or low_rank_of(None)
    # Stored in the layer's own type, so that a fraction of its bytes is the same fraction of its values.
    settings = Settings(device=device)
    for layer in steps("drawing", layers, progress):
        yield _removal(checkpoint.read(layer.name), layer, low_rank, settings)


def _removal(weight: Tensor, layer: Layer, low_rank: Target, settings: Settings) -> Removal:
    flaw = facts_of(weight).flaw
    if flaw is not None:
        return Removal(layer, reason=flaw)
    values = working_copy(weight, settings.device)
    try:
        setting = find_setting(lambda: weight, layer, low_rank, settings)
        if isinstance(setting, str):
            return Removal(layer, reason=setting)
        with torch.no_grad():
            rest = values - setting.fit(values).reconstruct()
    except (FormatError, NumericalError) as error:
        return Removal(layer, reason=error.reason)
    size, size_left = _size(values), _size(rest)
    limit = max(_limit(values, size), _limit(rest, size_left)) or 1.0
    left = size_left / size if size else 0.0
    return Removal(layer, setting, left, limit, _spread(values, limit), _spread(rest, limit))


def _size(values: Tensor) -> float:
    """Return the root mean square."""
    peak = float(values.abs().max())
    return peak * math.sqrt(_mean(values, 2, scale=peak)) if peak else 0.0


def _limit(values: Tensor, size: float) -> float:
    return min(float(values.abs().max()), _WIDEST * size)


def _spread(values: Tensor, limit: float) -> Values:
    counts = torch.zeros(BINS, dtype=torch.int64)
    for block in torch.split(values.reshape(-1), _BLOCK):
        places = ((block.double() / limit + 1) * (BINS / 2)).floor().clamp(0, BINS - 1).long()
        counts += torch.bincount(places, minlength=BINS).cpu()
    center = _mean(values, 1, scale=limit) * limit
    variance = _mean(values, 2, center, limit)
    kurtosis = None if variance <= _FLAT**2 else _mean(values, 4, center, limit) / variance**2 - 3
    return Values(tuple(counts.tolist()), kurtosis)


def _mean(values: Tensor, power: int, center: float = 0.0, scale: float = 1.0) -> float:
    """Return the mean of ((values - center) / scale)^power, summed in float64 a block at a time."""
    blocks = torch.split(values.reshape(-1), _BLOCK)
    total = math.fsum(float((((block.double() - center) / scale) ** power).sum()) for block in blocks)
    return total / values.numel()
