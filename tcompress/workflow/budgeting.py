"""make_plan(): one budget in bytes, the plan out: what to do with each layer, over all formats and stored types.

The loss of a plan is the sum over its layers of importance x squared relative error of the layer's output, each error
taken alone. It ranks plans; it is no forecast of a score.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from tcompress.checkpoint.layers import Layer, LayerKind, find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import Statistics
from tcompress.errors import LimitError, UsageError
from tcompress.formats import Format
from tcompress.workflow.allocation import Point, allocate, smallest_cost
from tcompress.workflow.calibration import require_source
from tcompress.workflow.checking import require_working_memory
from tcompress.workflow.curves import Candidate, curve_of, default_formats, default_types
from tcompress.workflow.importance import importances, input_moments, values_alone
from tcompress.workflow.plan import Plan, Rule, exactly
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.settings import TYPE_NAMES, Settings
from tcompress.workflow.survey import facts_of


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, what was chosen for it, and what it was chosen from. importance: what its error counts."""

    layer: Layer
    chosen: Candidate
    curve: Sequence[Candidate]
    importance: float
    why: str


@dataclass(frozen=True)
class Planned:
    """A plan and how it came about. bound: no choice within the budget has a smaller loss than this."""

    plan: Plan
    layers: Sequence[PlannedLayer]
    budget_bytes: int
    stored_bytes: int
    loss: float
    bound: float
    seconds: float
    notes: Sequence[str] = field(default=())


def make_plan(
    checkpoint: Checkpoint,
    *,
    keep: float | None = None,
    max_bytes: int | None = None,
    layers: Sequence[Layer] | None = None,
    formats: Sequence[type[Format]] = (),
    settings: Settings | None = None,
    reconstruction: Reconstruction | None = None,
    statistics: Statistics | None = None,
    progress: Progress = silent,
) -> Planned:
    """Return the plan of the smallest loss found within a budget; one of keep and max_bytes is given.

    keep: fraction of the layers' dense bytes that their factors may take. max_bytes: of the whole file.
    layers: those that may be compressed, all without it. formats: tried for each layer, by default all quick ones.
    settings: its ``store`` is the only stored type tried, where it is given. reconstruction: a model and inputs, by
    which errors are those of the layers' outputs, and weighed by what they do to the model's. statistics: of this
    checkpoint, from ``calibrate``, in the place of a model: errors of outputs, weighed by their sensitivities.

    Raises LimitError, with the smallest possible, when no choice fits the budget; UsageError for a compressed
    checkpoint, or without layers.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    if is_compressed(checkpoint):
        raise UsageError("is compressed already; decompress it first", path=checkpoint.path)
    if (keep is None) == (max_bytes is None):
        raise UsageError("give one budget: --keep or --max-bytes")
    chosen = list(find_layers(checkpoint) if layers is None else layers)
    if not chosen:
        raise UsageError("has no layer that could be compressed", path=checkpoint.path)
    require_working_memory(checkpoint, chosen)
    known = _Knowledge.of(checkpoint, chosen, reconstruction, statistics, progress)
    curves = [
        _curve(checkpoint, layer, known, formats or default_formats(), settings)
        for layer in steps("planning", chosen, progress)
    ]
    whole = keep is None
    budget = _budget(checkpoint, chosen, keep, max_bytes)
    points = [
        [_point(each, known.importance[layer.name], whole) for each in curve]
        for layer, curve in zip(chosen, curves, strict=True)
    ]
    found = allocate(points, budget)
    if found is None:
        least = smallest_cost(points)
        unit = "bytes of factors" if keep is not None else "bytes of factors and their description"
        share = least / sum(layer.dense_bytes for layer in chosen)
        raise LimitError(
            f"no plan keeps within {budget} {unit}; "
            f"the smallest takes {least}, --keep {math.ceil(share * 1e4) / 1e4:g}",
            path=checkpoint.path,
        )
    planned = [
        PlannedLayer(layer, curve[at], curve, known.importance[layer.name], _why(layer, curve[at], known))
        for layer, curve, at in zip(chosen, curves, found.chosen, strict=True)
    ]
    plan = Plan(tuple(_rule(each) for each in planned))
    seconds = time.perf_counter() - started
    return Planned(plan, planned, budget, found.cost, found.loss, found.bound, seconds)


def matching(checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> list[Layer]:
    """Return the layers that match one of the globs to include, all without any, and none of those to exclude.

    Raises UsageError when there are none.
    """
    layers = find_layers(checkpoint)
    found = [
        layer
        for layer in layers
        if (not include or any(fnmatch.fnmatchcase(layer.name, glob) for glob in include))
        and not any(fnmatch.fnmatchcase(layer.name, glob) for glob in exclude)
    ]
    if layers and not found:
        known = ", ".join(layer.name for layer in layers[:5])
        raise UsageError(f"no layer matches {', '.join(include) or '*'}; there are {known}", path=checkpoint.path)
    return found


@dataclass(frozen=True)
class _Knowledge:
    """What is known of the layers beside their weights. moments: of their inputs, where there is a model to run."""

    importance: Mapping[str, float]
    moments: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        layers: Sequence[Layer],
        reconstruction: Reconstruction | None,
        statistics: Statistics | None,
        progress: Progress,
    ) -> _Knowledge:
        if reconstruction is None and statistics is not None:
            return cls._from(checkpoint, layers, statistics)
        if reconstruction is None:
            return cls({layer.name: values_alone(layer) for layer in layers}, {})
        traced, batches = reconstruction.dense, reconstruction.batches
        moments = input_moments(traced, batches, checkpoint)
        return cls(importances(traced, batches, layers, checkpoint, moments, progress=progress), moments)

    @classmethod
    def _from(cls, checkpoint: Checkpoint, layers: Sequence[Layer], statistics: Statistics) -> _Knowledge:
        """Take moments and sensitivities; of a layer without them, the importance is that of its size alone."""
        require_source(statistics, checkpoint)
        weights, moments = {layer.name: values_alone(layer) for layer in layers}, {}
        for layer in layers:
            found = statistics.layers.get(layer.name)
            if found is None or found.counts:
                continue
            moments[layer.name] = found.moment
            matrix = checkpoint.read(layer.name).double().reshape(layer.shape[0], -1)
            moved = matrix * found.moment if found.diagonal else matrix @ found.moment
            change = found.positions_per_sample * float(((moved * matrix).sum(dim=1) * found.sensitivity).sum())
            weights[layer.name] = math.sqrt(layer.values * max(change, 0.0)) or values_alone(layer)
        return cls(weights, moments)


def _curve(
    checkpoint: Checkpoint, layer: Layer, known: _Knowledge, formats: Sequence[type[Format]], settings: Settings
) -> list[Candidate]:
    weight = checkpoint.read(layer.name)
    dense = Candidate(None, None, layer.dense_bytes, 0, 0.0)
    clash = any(name.startswith(layer.name + ".") for name in checkpoint)
    if clash or facts_of(weight).nonfinite:
        return [dense]
    types = default_types(layer) if settings.store is None else [settings.store]
    gram = None if layer.kind is LayerKind.EMBEDDING else known.moments.get(layer.name)
    return curve_of(layer, weight, formats, types, gram=gram, device=settings.device)


def _budget(checkpoint: Checkpoint, layers: Sequence[Layer], keep: float | None, max_bytes: int | None) -> int:
    dense = sum(layer.dense_bytes for layer in layers)
    if keep is not None:
        return math.floor(keep * dense)
    assert max_bytes is not None  # noqa: S101
    # What does not depend on the choice: the other tensors, their description, and the manifest's frame.
    return max_bytes - (sum(path.stat().st_size for path in checkpoint.files) - dense) - _FRAME


_FRAME = 400  # bytes of a manifest without layers, and of the alignment of the header


def _point(candidate: Candidate, importance: float, whole: bool) -> Point:
    cost = candidate.stored_bytes + (candidate.header_bytes if whole else 0)
    return Point(cost, importance * candidate.loss)


def _rule(planned: PlannedLayer) -> Rule:
    chosen, layer = planned.chosen, planned.layer
    comments: dict[str, Any] = {
        "dense_bytes": layer.dense_bytes,
        "stored_bytes": chosen.stored_bytes,
        "expected_error": float(f"{math.sqrt(chosen.loss):.4g}"),
        "why": planned.why,
    }
    return Rule(exactly(layer.name), chosen.format, comments=comments, store=chosen.store)


def _why(layer: Layer, chosen: Candidate, known: _Knowledge) -> str:
    if chosen.format is None:
        return "dense: its bytes are worth more here than elsewhere, or nothing is smaller"
    assert chosen.store is not None  # noqa: S101
    of_what = "output" if layer.name in known.moments and layer.kind is not LayerKind.EMBEDDING else "weight"
    part = chosen.stored_bytes / layer.dense_bytes
    return (
        f"{chosen.format.name} in {TYPE_NAMES[chosen.store]} at {part:.1%} of its bytes; "
        f"error of the {of_what}, importance {known.importance[layer.name]:.3g}"
    )
