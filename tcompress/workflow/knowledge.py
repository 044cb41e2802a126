"""What is known of layers beside their weights: what their errors count, their inputs, how often they are called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import LayerStatistics, Statistics
from tcompress.workflow.calibration import require_source
from tcompress.workflow.importance import importances, input_moments, values_alone
from tcompress.workflow.multiplications import Call, calls_of
from tcompress.workflow.progress import Progress
from tcompress.workflow.reconstruction import Reconstruction


@dataclass(frozen=True)
class Knowledge:
    """importance: what a layer's error counts. moments: of the inputs; calls: on a batch; where there are any known."""

    importance: Mapping[str, float]
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    calls: Mapping[str, Sequence[Call]] = field(default_factory=dict)

    def calls_of(self, layer: Layer) -> Sequence[Call]:
        """Return the calls of a layer; one with one position where nothing is known of them."""
        return self.calls.get(layer.name, (Call(),))

    def gram_of(self, layer: Layer) -> Tensor | None:
        """Return the second moment of a layer's input, as ``Format.fit`` has it."""
        return None if layer.kind is LayerKind.EMBEDDING else self.moments.get(layer.name)


def known_of(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    reconstruction: Reconstruction | None,
    statistics: Statistics | None,
    progress: Progress,
) -> Knowledge:
    """Return what a model with its inputs says, or else the statistics of one, or else the layers' sizes alone."""
    if reconstruction is not None:
        traced, batches = reconstruction.dense, reconstruction.batches
        moments = input_moments(traced, batches, checkpoint)
        weights = importances(traced, batches, layers, checkpoint, moments, progress=progress)
        return Knowledge(weights, moments, calls_of(traced, batches[0]))
    if statistics is not None:
        return _from(checkpoint, layers, statistics)
    return Knowledge({layer.name: values_alone(layer) for layer in layers})


def _from(checkpoint: Checkpoint, layers: Sequence[Layer], statistics: Statistics) -> Knowledge:
    """Take moments and sensitivities; of a layer without them, the importance is that of its size alone."""
    require_source(statistics, checkpoint)
    weights = {layer.name: values_alone(layer) for layer in layers}
    vectors = {
        layer: found
        for layer in layers
        if (found := statistics.layers.get(layer.name)) is not None and not found.counts
    }
    for layer, found in vectors.items():
        weights[layer.name] = math.sqrt(layer.values * _change(checkpoint, layer, found)) or values_alone(layer)
    moments = {layer.name: found.moment for layer, found in vectors.items()}
    calls = {layer.name: [Call(max(1, round(found.positions_per_sample)))] for layer, found in vectors.items()}
    return Knowledge(weights, moments, calls)


def _change(checkpoint: Checkpoint, layer: Layer, found: LayerStatistics) -> float:
    """Return how far the objective moves, to second order, when the layer's output is gone."""
    matrix = checkpoint.read(layer.name).double().reshape(layer.shape[0], -1)
    moved = matrix * found.moment if found.diagonal else matrix @ found.moment
    return max(found.positions_per_sample * float(((moved * matrix).sum(dim=1) * found.sensitivity).sum()), 0.0)
