"""What is known of layers beside their weights: what their errors count, their inputs, how often they are called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import LayerStatistics, Statistics
from tcompress.formats.metric import PLAIN, Metric
from tcompress.workflow.assumed import assumed_metric
from tcompress.workflow.calibration import require_source
from tcompress.workflow.importance import importances, outputs_alone, values_alone
from tcompress.workflow.moments import metric_of_counts, metrics_of
from tcompress.workflow.multiplications import Call, calls_of
from tcompress.workflow.progress import Progress
from tcompress.workflow.reconstruction import Reconstruction


@dataclass(frozen=True)
class Knowledge:
    """importance: what a layer's error counts. metrics: which errors do; calls: on a batch; where they are known.

    inputs: what the metrics come from, if they are assumed.
    """

    importance: Mapping[str, float]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    calls: Mapping[str, Sequence[Call]] = field(default_factory=dict)
    inputs: str | None = None

    def importance_of(self, layer: Layer) -> float:
        """Return what a layer's error counts; by its size alone where nothing is known, as it can only stay dense."""
        return self.importance.get(layer.name, values_alone(layer))

    def calls_of(self, layer: Layer) -> Sequence[Call]:
        """Return the calls of a layer; one with one position where nothing is known of them."""
        return self.calls.get(layer.name, (Call(),))

    def metric_of(self, layer: Layer) -> Metric:
        """Return which errors of a layer count."""
        return self.metrics.get(layer.name, PLAIN)

    def inputs_of(self, layer: Layer) -> str | None:
        """Return what was assumed of the layer's inputs, if that makes a difference."""
        return None if self.metric_of(layer).is_plain else self.inputs


def known_of(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    reconstruction: Reconstruction | None,
    statistics: Statistics | None,
    inputs: str,
    progress: Progress,
) -> Knowledge:
    """Return what a model with its inputs says, or else the statistics of one, or else the layers' shapes.

    inputs: what is assumed of them in the last case.
    """
    if reconstruction is not None:
        traced, batches = reconstruction.dense, reconstruction.batches
        metrics = metrics_of(traced, batches, checkpoint)
        weights = importances(traced, batches, layers, checkpoint, metrics, progress=progress)
        return Knowledge(weights, metrics, calls_of(traced, batches[0]))
    if statistics is not None:
        return _from(checkpoint, layers, statistics)
    metrics = {layer.name: assumed_metric(layer, inputs) for layer in layers}
    return Knowledge({layer.name: outputs_alone(layer) for layer in layers}, metrics, inputs=inputs)


def _from(checkpoint: Checkpoint, layers: Sequence[Layer], statistics: Statistics) -> Knowledge:
    """Take moments and sensitivities; of a layer without them, the importance is that of its size alone."""
    require_source(statistics, checkpoint)
    weights = {layer.name: values_alone(layer) for layer in layers}
    metrics, calls = {}, {}
    for layer in layers:
        found = statistics.layers.get(layer.name)
        if found is None:
            continue
        metrics[layer.name] = metric_of_counts(found.moment) if found.counts else Metric(found.moment)
        weight = checkpoint.read(layer.name)
        counted = metrics[layer.name].counted(weight)
        weights[layer.name] = math.sqrt(counted * _change(weight, found)) or values_alone(layer)
        if not found.counts:
            calls[layer.name] = [Call(max(1, round(found.positions_per_sample)))]
    return Knowledge(weights, metrics, calls)


def _change(weight: Tensor, found: LayerStatistics) -> float:
    """Return how far the objective moves, to second order, when the layer's output is gone."""
    matrix = weight.double().reshape(len(weight), -1)
    if found.counts:
        channels = found.moment.double() @ matrix.square() / max(float(found.moment.sum()), 1.0)
        return found.positions_per_sample * float((channels * found.sensitivity).sum())
    moved = matrix * found.moment if found.diagonal else matrix @ found.moment
    return max(found.positions_per_sample * float(((moved * matrix).sum(dim=1) * found.sensitivity).sum()), 0.0)
