"""What a layer's error is worth: how far the model's output moves when the layer is wrong.

Letters: W (out, n) = the weight as its matrix; G (n, n) = the second moment of its input; D = the squared distance of
the model's outputs from the dense model's over their squared size; r = the squared relative error of the layer's
output that caused it. Of a table both are of those rows that are looked up: how much others lose says nothing of D.

Nothing is differentiated and no labels are needed: each layer in turn is pruned hard, alone, and the model is run. D/r
is what an error of this layer costs; damage of a real size is seen as it is, and not as its slope at zero. That is an
average over the layer. Where few values make a layer, single ones matter more than it says, so that the importance of
a layer is the geometric mean of D / r and of its number of values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.formats.metric import PLAIN, Metric
from tcompress.formats.sparse import Sparse
from tcompress.workflow.fitting import working_copy
from tcompress.workflow.moments import lookups_of
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.samples import first_samples, outputs_in
from tcompress.workflow.tracing import Traced

_PRUNED_TO = 0.15  # of the values: an error of the size that compression makes
_ENOUGH = 256  # samples that the model is run on for each layer


def outputs_alone(layer: Layer) -> float:
    """Return the importance of a layer where none is known by more than its shape: the root of its outputs' number.

    An error that is equal to its layer's output in relative size is taken to cost the model about as much in any layer
    (the geometric mean of that, 1, and of how many outputs have it). Of a table outputs are its rows: what is looked
    up, and what words are compared with where it is the last layer as well. Against the root of the values this asks
    less of wide inputs; with it language models of two kinds keep more, and convolutional networks as much.
    """
    return math.sqrt(layer.shape[0])


def values_alone(layer: Layer) -> float:
    """Return the importance of a layer of which nothing but its size is known, among others that are measured."""
    return math.sqrt(layer.values)


def importances(
    traced: Traced,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    checkpoint: Checkpoint,
    metrics: Mapping[str, Metric],
    *,
    progress: Progress = silent,
) -> dict[str, float]:
    """Return the importance of every layer; of one that the model does not use, that of its size alone.

    metrics: which errors of a layer count, where that is known. The model has its own weights again when this is done.
    """
    few = first_samples(batches, _ENOUGH)
    before = [outputs_in(traced.run(batch)) for batch in few]
    lookups = lookups_of(traced, few, checkpoint)
    found = {}
    for layer in steps("weighing", layers, progress):
        uses = [use for use in traced.uses if use.layer.name == layer.name]
        weight = working_copy(checkpoint.read(layer.name), traced.device)
        metric = metrics.get(layer.name, PLAIN).like(weight)
        # Rows as other text will find them: those of these samples are better off than most.
        seen = Metric(rows=lookups[layer.name]) if layer.name in lookups else metric
        damaged = (PLAIN if layer.name in lookups else metric).fit(Sparse(density=_PRUNED_TO), weight)
        damaged_weight = damaged.reconstruct().detach()
        r = seen.square(weight - damaged_weight) / (seen.square(weight) or 1.0)
        if not uses or r == 0:
            found[layer.name] = values_alone(layer)
            continue
        held = [getattr(use.module, use.attribute) for use in uses]
        kept = held[0].clone()
        with torch.no_grad():
            held[0].copy_(damaged_weight)
        distance = _distance(before, [outputs_in(traced.run(batch)) for batch in few])
        with torch.no_grad():
            held[0].copy_(kept)
        found[layer.name] = math.sqrt(metric.counted(weight) * distance / r)
    return found


def _distance(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """Return the squared distance of outputs over their squared size; infinite ones count as wrong altogether."""
    apart = size = 0.0
    for was, now in zip(before, after, strict=True):
        for one, other in zip(was, now, strict=True):
            apart += float((one - other).square().sum(dtype=torch.float64))
            size += float(one.square().sum(dtype=torch.float64))
    return min(apart / size, 1.0) if size and math.isfinite(apart) else 1.0
