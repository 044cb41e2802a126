"""What each layer of a checkpoint could become: found once, whatever the budget it is then chosen for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import Statistics
from tcompress.errors import UsageError
from tcompress.formats import Format
from tcompress.workflow.assumed import SMOOTH
from tcompress.workflow.checking import require_working_memory
from tcompress.workflow.curves import curve_of, default_formats, default_types
from tcompress.workflow.knowledge import Knowledge, known_of
from tcompress.workflow.multiplications import multiplications
from tcompress.workflow.planning import find_clash
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.prospects import of_amount
from tcompress.workflow.rank_multiples import check_multiple
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.repairs import may_change
from tcompress.workflow.settings import Settings
from tcompress.workflow.survey import Facts, refuse_nonfinite, survey
from tcompress.workflow.trial import Candidate

_LITTLE = 0.035  # of a layer's elements


@dataclass(frozen=True)
class Choices:
    """Layers, of each the candidates to choose from, and what is known of it.

    facts: of the layers' weights. barred: layer -> why it can only stay dense. repaired: names of tensors that may be.
    seconds: that finding all this took.
    """

    checkpoint: Checkpoint
    layers: Sequence[Layer]
    curves: Sequence[Sequence[Candidate]]
    known: Knowledge
    facts: Mapping[str, Facts]
    barred: Mapping[str, str]
    device: torch.device
    repaired: Sequence[str]
    seconds: float

    @property
    def dense_bytes(self) -> int:
        """Bytes of all layers as the checkpoint has them."""
        return sum(layer.dense_bytes for layer in self.layers)


def choices_of(
    checkpoint: Checkpoint,
    *,
    layers: Sequence[Layer] | None = None,
    formats: Sequence[type[Format]] = (),
    settings: Settings | None = None,
    rank_multiple: int = 1,
    reconstruction: Reconstruction | None = None,
    statistics: Statistics | None = None,
    for_flops: bool = False,
    inputs: str = SMOOTH,
    progress: Progress = silent,
) -> Choices:
    """Return what each layer could become. Arguments are those of ``make_plan``, and errors, LimitError aside.

    for_flops: to choose from by multiplications, not bytes: formats do not stand in each other's way, and factors are
    stored in the layer's own type unless ``settings`` say another.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    check_multiple(rank_multiple)
    if is_compressed(checkpoint):
        raise UsageError("is compressed already; decompress it first", path=checkpoint.path)
    chosen = list(find_layers(checkpoint) if layers is None else layers)
    if not chosen:
        raise UsageError("has no layer that could be compressed", path=checkpoint.path)
    require_working_memory(checkpoint, chosen)
    facts = survey(checkpoint, chosen, progress=progress)
    refuse_nonfinite(checkpoint, facts, settings)
    barred = {each.name: why for each in chosen if (why := facts[each.name].flaw or find_clash(checkpoint, each))}
    free = [layer for layer in chosen if layer.name not in barred]
    known = known_of(checkpoint, free, reconstruction, statistics, inputs, progress)
    find = partial(_curve, checkpoint, known, formats or default_formats(), settings, rank_multiple, for_flops)
    curves = [[_dense(layer)] if layer.name in barred else find(layer) for layer in steps("planning", chosen, progress)]
    repaired = may_change(checkpoint, reconstruction)
    seconds = time.perf_counter() - started
    return Choices(checkpoint, chosen, curves, known, facts, barred, settings.device, repaired, seconds)


def _dense(layer: Layer) -> Candidate:
    return Candidate(None, None, layer.dense_bytes, 0, 0.0)


def _curve(
    checkpoint: Checkpoint,
    known: Knowledge,
    formats: Sequence[type[Format]],
    settings: Settings,
    rank_multiple: int,
    for_flops: bool,
    layer: Layer,
) -> list[Candidate]:
    types = default_types(layer) if settings.store is None else [settings.store]
    curve = partial(
        curve_of,
        layer,
        checkpoint.read(layer.name),
        metric=known.metric_of(layer),
        device=settings.device,
        rank_multiple=rank_multiple,
    )
    if not for_flops:
        return curve(formats, types)
    kinds = [kind for kind in formats if _may_save(kind, layer, known)]
    return [_dense(layer), *(each for kind in kinds for each in curve([kind], types[-1:])[1:])]


def _may_save(kind: type[Format], layer: Layer, known: Knowledge) -> bool:
    """Tell whether a poor setting of the format multiplies less than the dense layer."""
    setting = of_amount(kind, layer, _LITTLE)
    calls = known.calls_of(layer)
    return setting is None or multiplications(layer, setting, calls) < multiplications(layer, None, calls)
