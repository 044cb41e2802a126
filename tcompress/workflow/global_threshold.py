"""One threshold on magnitudes over many layers, found exactly while only one layer is in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.formats import Format, make
from tcompress.linalg.magnitude import COARSE_BINS, Array, coarse_counts, counts_around, fine_counts, threshold_bin
from tcompress.workflow.plan import Rule, Target


def share_threshold(
    checkpoint: Checkpoint, layers: Sequence[Layer], rule: Rule, stored: Mapping[str, torch.dtype]
) -> dict[str, Format]:
    """Return each layer's setting when one threshold keeps the rule's amount of all of them together.

    The amount is a density (of their values) or a keep (of their dense bytes). Of equal magnitudes at the threshold
    those of earlier layers are kept.
    """
    histograms = {layer.name: _Histogram(coarse_counts(checkpoint.read(layer.name))) for layer in layers}
    total = sum(layer.values for layer in layers)
    if isinstance(rule.format, Target):
        budget = math.floor((rule.format.keep or 0) * sum(layer.dense_bytes for layer in layers))
        count = _count_within(layers, histograms, stored, budget)
        format_type, options = rule.format.format, dict(rule.format.options)
    else:
        assert rule.format is not None  # noqa: S101
        options = rule.format.options()
        format_type = type(rule.format)
        count = math.floor(options[format_type.size_option] * total + 0.5)
    kept = _kept(checkpoint, layers, histograms, count)
    return {
        layer.name: make(format_type, {**options, format_type.size_option: kept[layer.name] / layer.values})
        for layer in layers
    }


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
    layers: Sequence[Layer], histograms: Mapping[str, _Histogram], stored: Mapping[str, torch.dtype], budget: int
) -> int:
    """Return how many values can be kept within the budget: whole coarse bins, then what the rest allows."""

    def nbytes(coarse_bin: int) -> int:
        return sum(
            min(layer.dense_bytes, _bytes(layer, stored[layer.name], histograms[layer.name].at_or_above(coarse_bin)))
            for layer in layers
        )

    lowest = _first_true(COARSE_BINS, lambda coarse_bin: nbytes(coarse_bin) <= budget)
    whole = sum(histogram.at_or_above(lowest) for histogram in histograms.values())
    dearest = max(stored[layer.name].itemsize for layer in layers) + 4
    return whole + max(0, budget - nbytes(lowest)) // dearest


def _kept(
    checkpoint: Checkpoint, layers: Sequence[Layer], histograms: Mapping[str, _Histogram], count: int
) -> dict[str, int]:
    """Return how many values each layer keeps of the ``count`` largest of all."""
    if count <= 0:
        return {layer.name: 0 for layer in layers}
    coarse = _first_true(COARSE_BINS, lambda b: sum(h.at_or_above(b) for h in histograms.values()) < count) - 1
    above = sum(histogram.at_or_above(coarse + 1) for histogram in histograms.values())
    fine_total = sum(fine_counts(checkpoint.read(layer.name), coarse) for layer in layers)
    fine, above_fine = threshold_bin(np.asarray(fine_total), count - above)
    ties_left = count - above - above_fine
    kept = {}
    for layer in layers:
        larger, equal = counts_around(checkpoint.read(layer.name), coarse, fine)
        taken = min(equal, ties_left)
        ties_left -= taken
        kept[layer.name] = larger + taken
    return kept


def _bytes(layer: Layer, store: torch.dtype, kept: int) -> int:
    return cheapest_bytes(FactorSpec((layer.shape[0], layer.values // layer.shape[0]), store, kept))


def _first_true(end: int, test: Callable[[int], bool]) -> int:
    """Return the smallest number in 0..end at which a monotone test is true (``end`` counts as true)."""
    low, high = 0, end
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle + 1, high)
    return low
