"""One threshold on magnitudes over many layers, found exactly while only one layer is in memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError
from tcompress.formats import Format, make
from tcompress.linalg.magnitude import COARSE_BINS, Array, coarse_counts, inside_bin, threshold_bin
from tcompress.workflow.fitting import working_copy
from tcompress.workflow.layout import planned_bytes
from tcompress.workflow.plan import Rule, Target

CPU = torch.device("cpu")


def share_threshold(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    rule: Rule,
    stored: Mapping[str, torch.dtype],
    device: torch.device = CPU,
) -> dict[str, Format | Target]:
    """Return each layer's setting when one threshold keeps the rule's amount of all of them together.

    The amount is a density (of their values) or a keep (of their dense bytes). Of equal magnitudes at the threshold
    those of earlier layers are kept. Where the threshold decides about what another part of the format leaves, that
    part is fitted for it twice, and never held: a layer is in memory at a time, and of the others some counts.

    A layer on which the format has no room at all keeps its Target, and with it the reason; one of which the other part
    cannot be computed keeps its setting, whose fit will say why.
    """
    settings = {layer.name: _setting(rule, layer, stored[layer.name]) for layer in layers}
    fitting = [layer for layer in layers if isinstance(settings[layer.name], Format)]
    if not fitting:
        return settings

    def unpruned(layer: Layer) -> torch.Tensor:
        setting = settings[layer.name]
        assert isinstance(setting, Format)  # noqa: S101
        return setting.unpruned(working_copy(checkpoint.read(layer.name), device))

    histograms = {}
    for layer in fitting:
        with contextlib.suppress(NumericalError):
            histograms[layer.name] = _Histogram(coarse_counts(unpruned(layer)))
    fitting = [layer for layer in fitting if layer.name in histograms]
    if not fitting:
        return settings
    if isinstance(rule.format, Target):
        budget = math.floor((rule.format.keep or 0) * sum(layer.dense_bytes for layer in fitting))
        count = _count_within(fitting, histograms, settings, stored, budget)
    else:
        assert rule.format is not None  # noqa: S101
        total = sum(layer.values for layer in fitting)
        count = math.floor(getattr(rule.format, rule.format.size_option) * total + 0.5)
    kept = _kept(fitting, histograms, count, unpruned)
    return {**settings, **{layer.name: _resized(settings[layer.name], layer, kept[layer.name]) for layer in fitting}}


def _setting(rule: Rule, layer: Layer, store: torch.dtype) -> Format | Target:
    """Return the rule's setting for a layer, all but the number of values kept."""
    target = rule.format
    if not isinstance(target, Target):
        assert target is not None  # noqa: S101
        return target.pinned(layer.shape)
    own_part = math.floor((target.keep or 0) * layer.dense_bytes)
    return target.format.within(layer.shape, store, own_part, **target.options) or target


def _resized(setting: Format | Target, layer: Layer, kept: int) -> Format:
    assert isinstance(setting, Format)  # noqa: S101
    return make(type(setting), {**setting.options(), setting.size_option: kept / layer.values})


class _Histogram:
    """A layer's magnitudes by coarse bin, without the empty bins at both ends."""

    def __init__(self, counts: Array) -> None:
        used = np.flatnonzero(counts)
        self.first = int(used[0])
        self.from_above = counts[self.first : int(used[-1]) + 1][::-1].cumsum()[::-1].copy()

    def at_or_above(self, coarse_bin: int) -> int:
        position = max(coarse_bin - self.first, 0)
        return int(self.from_above[position]) if position < len(self.from_above) else 0


def _count_within(
    layers: Sequence[Layer],
    histograms: Mapping[str, _Histogram],
    settings: Mapping[str, Format | Target],
    stored: Mapping[str, torch.dtype],
    budget: int,
) -> int:
    """Return how many values can be kept within the budget: whole coarse bins, then what the rest allows."""

    def nbytes(layer: Layer, coarse_bin: int) -> int:
        setting = _resized(settings[layer.name], layer, histograms[layer.name].at_or_above(coarse_bin))
        factors, header = planned_bytes(layer, setting, stored[layer.name], None)
        return factors if factors + header < layer.dense_bytes else layer.dense_bytes

    def all_bytes(coarse_bin: int) -> int:
        return sum(nbytes(layer, coarse_bin) for layer in layers)

    lowest = _first_true(COARSE_BINS, lambda coarse_bin: all_bytes(coarse_bin) <= budget)
    whole = sum(histogram.at_or_above(lowest) for histogram in histograms.values())
    dearest = max(stored[layer.name].itemsize for layer in layers) + 4
    most = sum(layer.values for layer in layers)
    return min(most, whole + max(0, budget - all_bytes(lowest)) // dearest)


def _kept(
    layers: Sequence[Layer],
    histograms: Mapping[str, _Histogram],
    count: int,
    unpruned: Callable[[Layer], torch.Tensor],
) -> dict[str, int]:
    """Return how many values each layer keeps of the ``count`` largest of all."""
    if count <= 0:
        return {layer.name: 0 for layer in layers}
    coarse = _first_true(COARSE_BINS, lambda b: sum(h.at_or_above(b) for h in histograms.values()) < count) - 1
    above = {layer.name: histograms[layer.name].at_or_above(coarse + 1) for layer in layers}
    inside = {layer.name: inside_bin(unpruned(layer), coarse) for layer in layers}
    together = np.zeros(1 << 15, dtype=np.int64)
    for patterns, counts in inside.values():
        together[patterns] += counts
    fine, above_fine = threshold_bin(together, count - sum(above.values()))
    ties_left = count - sum(above.values()) - above_fine
    kept = {}
    for layer in layers:
        patterns, counts = inside[layer.name]
        taken = min(int(counts[patterns == fine].sum()), ties_left)
        ties_left -= taken
        kept[layer.name] = above[layer.name] + int(counts[patterns > fine].sum()) + taken
    return kept


def _first_true(end: int, test: Callable[[int], bool]) -> int:
    """Return the smallest number in 0..end at which a monotone test is true (``end`` counts as true)."""
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle + 1, high)
    return low
