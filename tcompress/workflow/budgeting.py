"""make_plan(): one budget in, the plan out: what to do with each layer, over all formats and stored types.

The loss of a plan is the sum over its layers of importance x squared relative error of the layer's output, each error
taken alone. It ranks plans; it is no forecast of a score.
"""

from __future__ import annotations

import fnmatch
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tcompress.checkpoint.layers import Layer, LayerKind, find_layers
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import Statistics
from tcompress.errors import UsageError, listed
from tcompress.formats import Format
from tcompress.workflow.allocation import Allocation, allocate, smallest_cost
from tcompress.workflow.assumed import PLAIN_INPUTS, SMOOTH, check_inputs
from tcompress.workflow.budgets import Budget, limit_of, points_of, unmet
from tcompress.workflow.cheapest import cheapest_within
from tcompress.workflow.choices import Choices, choices_of
from tcompress.workflow.evaluations import Search
from tcompress.workflow.knowledge import Knowledge
from tcompress.workflow.multiplications import multiplications
from tcompress.workflow.plan import Plan, Rule, exactly
from tcompress.workflow.progress import Progress, silent
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.settings import TYPE_NAMES, Settings
from tcompress.workflow.trial import Candidate
from tcompress.workflow.whole_file import WholeFile

_NAMED = 3  # layers in a note


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, what was chosen for it, and what it was chosen from. importance: what its error counts.

    multiplications: on one run of the model, dense_multiplications: of the dense layer; of one position each where no
    run is known. inputs: what was assumed of the layer's, if anything.
    """

    layer: Layer
    chosen: Candidate
    curve: Sequence[Candidate]
    importance: float
    why: str
    multiplications: int
    dense_multiplications: int
    inputs: str | None


@dataclass(frozen=True)
class Planned:
    """A plan and how it came about.

    budget: by its name. limit: the same as a whole number of bytes or multiplications; None for a limit of errors.
    bound: no choice that costs no more has a smaller loss than this. search: how the budget was found, if it was.
    """

    plan: Plan
    layers: Sequence[PlannedLayer]
    budget: dict[str, float]
    limit: int | None
    loss: float
    bound: float
    seconds: float
    notes: Sequence[str] = field(default=())
    search: Search | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all layers' factors."""
        return sum(each.chosen.stored_bytes for each in self.layers)


def make_plan(
    checkpoint: Checkpoint,
    *,
    keep: float | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
    flops: float | None = None,
    layers: Sequence[Layer] | None = None,
    formats: Sequence[type[Format]] = (),
    settings: Settings | None = None,
    rank_multiple: int = 1,
    reconstruction: Reconstruction | None = None,
    statistics: Statistics | None = None,
    inputs: str | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress = silent,
) -> Planned:
    """Return the plan of the smallest loss found within a budget; one of keep, max_bytes, max_error and flops is given.

    keep: fraction of the layers' dense bytes that their factors may take. max_bytes: of the whole file, or all files of
    a folder, with shards of ``max_shard_bytes`` as in ``compress``, which then writes no more. flops: fraction of the
    layers' dense multiplications. max_error: no layer's relative error is larger, and its bytes are the fewest.
    layers: those that may be compressed, all without it. formats: tried for each layer, by default all quick ones.
    settings: its ``store`` is the only stored type tried, where it is given. rank_multiple: of which all ranks are.
    reconstruction: a model and inputs, by which errors are those of the layers' outputs, and weighed by what they do to
    the model's. statistics: of this checkpoint, from ``calibrate``, in the place of a model: errors of outputs, weighed
    by their sensitivities. inputs: what is assumed of them without either, ``smooth`` or ``plain``; None: what
    ``usual_inputs`` says.

    Raises LimitError, with the smallest possible, when no choice fits the budget; UsageError for a compressed
    checkpoint, or without layers; NumericalError for NaN or Inf in a layer, unless ``settings`` let it stay dense.
    """
    budget = Budget(keep, max_bytes, max_error, flops)
    check_inputs(inputs, are_known=reconstruction is not None or statistics is not None)
    choices = choices_of(
        checkpoint,
        layers=layers,
        formats=formats,
        settings=settings,
        rank_multiple=rank_multiple,
        reconstruction=reconstruction,
        statistics=statistics,
        for_flops=flops is not None,
        inputs=inputs or usual_inputs(budget),
        progress=progress,
    )
    return choose(choices, budget, max_shard_bytes=max_shard_bytes)


def usual_inputs(budget: Budget | None) -> str:
    """Return what is assumed of inputs unasked: a limit of errors is one of the weights' own."""
    return PLAIN_INPUTS if budget is not None and budget.max_error is not None else SMOOTH


def choose(choices: Choices, budget: Budget, *, max_shard_bytes: int | None = None) -> Planned:
    """Return the best plan within a budget. Raises LimitError, with the smallest possible, when there is none.

    max_shard_bytes: of the output, as in ``make_plan``.
    """
    started = time.perf_counter()
    if budget.max_error is not None:
        chosen, loss, bound, limit = *_within_error(choices, budget.max_error), None
    else:
        limit = limit_of(choices, budget)
        found = _allocated(choices, budget, limit, max_shard_bytes)
        chosen = [curve[at] for curve, at in zip(choices.curves, found.chosen, strict=True)]
        loss, bound = found.loss, found.bound
    layers = [
        _planned(layer, each, curve, choices, budget)
        for layer, each, curve in zip(choices.layers, chosen, choices.curves, strict=True)
    ]
    plan = Plan(tuple(_rule(each) for each in layers))
    seconds = choices.seconds + time.perf_counter() - started
    return Planned(plan, layers, budget.given(), limit, loss, bound, seconds, _notes(choices, budget))


def _allocated(choices: Choices, budget: Budget, limit: int, max_shard_bytes: int | None) -> Allocation:
    points = points_of(choices, budget)
    if budget.max_bytes is None:
        found, least = allocate(points, limit), smallest_cost(points)
    else:
        whole = WholeFile(choices, points, max_shard_bytes)
        found, least = whole.best_within(limit), whole.nbytes(whole.smallest.chosen)
    if found is None:
        raise unmet(choices, budget, limit, least)
    return found


def _within_error(choices: Choices, max_error: float) -> tuple[list[Candidate], float, float]:
    """Return the fewest bytes of each layer within the error, the loss, and what no plan of as many bytes is below."""
    chosen = [
        cheapest_within(
            choices.checkpoint.read(layer.name),
            curve,
            max_error,
            metric=choices.known.metric_of(layer),
            device=choices.device,
        )
        for layer, curve in zip(choices.layers, choices.curves, strict=True)
    ]
    weights = [choices.known.importance_of(layer) for layer in choices.layers]
    loss = math.fsum(weight * each.loss for weight, each in zip(weights, chosen, strict=True))
    of_bytes = Budget(keep=1)
    best = allocate(points_of(choices, of_bytes), sum(each.stored_bytes for each in chosen))
    return chosen, loss, loss if best is None else min(loss, best.bound)


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
        known = listed([layer.name for layer in layers], 5)
        raise UsageError(f"no layer matches {', '.join(include) or '*'}; there are {known}", path=checkpoint.path)
    return found


def _planned(
    layer: Layer, chosen: Candidate, curve: Sequence[Candidate], choices: Choices, budget: Budget
) -> PlannedLayer:
    known = choices.known
    calls = known.calls_of(layer)
    return PlannedLayer(
        layer,
        chosen,
        curve,
        known.importance_of(layer),
        choices.barred.get(layer.name) or _why(layer, chosen, known) or _why_dense(curve, budget),
        multiplications(layer, chosen.format, calls),
        multiplications(layer, None, calls),
        known.inputs_of(layer),
    )


def _rule(planned: PlannedLayer) -> Rule:
    chosen, layer = planned.chosen, planned.layer
    comments: dict[str, Any] = {
        "dense_bytes": layer.dense_bytes,
        "stored_bytes": chosen.stored_bytes,
        "expected_error": float(f"{math.sqrt(chosen.loss):.4g}"),
        "why": planned.why,
    }
    inputs = None if chosen.format is None else planned.inputs
    return Rule(exactly(layer.name), chosen.format, comments=comments, store=chosen.store, inputs=inputs)


def _why_dense(curve: Sequence[Candidate], budget: Budget) -> str:
    """Say which it is: there was nothing else to choose, or what there was is not worth it."""
    by_flops = budget.flops is not None
    if len(curve) == 1:
        return "nothing tried multiplies less" if by_flops else "nothing tried is smaller"
    if budget.max_error is not None:
        return "whatever is smaller has a larger error than is allowed"
    return f"its {'multiplications' if by_flops else 'bytes'} are worth more here than elsewhere"


def _why(layer: Layer, chosen: Candidate, known: Knowledge) -> str | None:
    """Say what was chosen, None for the dense layer."""
    if chosen.format is None or chosen.store is None:
        return None
    assumed = known.inputs_of(layer)
    of_what = "weight" if known.metric_of(layer).is_plain else "output"
    of_what += "" if assumed is None else f" for {assumed} inputs"
    part = chosen.stored_bytes / layer.dense_bytes
    return (
        f"{chosen.format.name} in {TYPE_NAMES[chosen.store]} at {part:.1%} of its bytes; "
        f"error of the {of_what}, importance {known.importance_of(layer):.3g}"
    )


def _notes(choices: Choices, budget: Budget) -> list[str]:
    """Say what multiplications were counted by, where they were."""
    counted = [layer for layer in choices.layers if layer.kind is not LayerKind.EMBEDDING]
    unseen = [layer.name for layer in counted if layer.name not in choices.known.calls]
    if budget.flops is None or not unseen:
        return []
    if not choices.known.calls:
        return ["multiplications are those of one position of each layer; --task counts the positions of the model"]
    return [f"layers that no call was seen of count one position: {listed(unseen, _NAMED)}"]
