"""Figures 5 and 6 of the low-rank-plus-sparse paper as PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tcompress.report.asked import split_asked
from tcompress.report.drawing import DOTS_PER_INCH, LINES, legible, make_folder, save, shortened, stem_of, styled
from tcompress.report.figures import as_error, as_shape
from tcompress.workflow.removal import Removal, Values
from tcompress.workflow.results import Analysis, AnalysisRow

_BANDS = {"spatial convolution": "#ffffff", "pointwise convolution": "#fbe9c6", "linear, embedding": "#e4ecf2"}
_BEFORE, _AFTER = "#6b7f8f", "#ff7f0e"
_LABELS_SHOWN = 120
_LABEL_LENGTH = 44


def draw(analysis: Analysis, removals: Iterable[Removal], folder: Path) -> tuple[list[Path], list[str]]:
    """Draw the errors of all layers and what removing its low-rank part does to each: the files, and what is missing.

    Raises OutputError when they cannot be written.
    """
    make_folder(folder)
    files, notes, taken = [], [], {"errors"}
    with styled():
        files += save(error_figure(analysis), folder / "errors")
        for removal in removals:
            if removal.reason is not None:
                notes.append(f"no figure of {removal.layer.name}: {removal.reason}")
                continue
            files += save(removal_figure(removal), folder / stem_of("weights", removal.layer.name, taken))
    return files, notes


def error_figure(analysis: Analysis) -> Figure:
    """Return figure 5: the relative error of each layer, a panel for each amount and a line for each format."""
    layers = analysis.layers
    panels: dict[str, dict[str, dict[str, AnalysisRow]]] = {}
    for row in analysis.rows:
        label, amount = split_asked(row.asked)
        panels.setdefault(amount, {}).setdefault(label, {})[row.layer.name] = row
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    looks = {label: LINES[position % len(LINES)] for position, label in enumerate(labels)}
    every = math.ceil(len(layers) / _LABELS_SHOWN)
    ticks = {place: _tick(layers[place].name) for place in range(0, len(layers), every)}
    height = 0.8 + 0.075 * max(map(len, ticks.values())) + 2.1 * len(panels)
    size = (min(max(7.5, 3.5 + 0.17 * len(layers)), 30.0), height)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    shown: dict[str, Artist] = {}
    for axes, (amount, lines) in zip(_stacked(figure, len(panels)), panels.items(), strict=True):
        shown |= _shade(axes, [_band(row) for row in next(iter(lines.values())).values()])
        for label, rows in lines.items():
            errors = [math.nan if (found := rows[layer.name].relative_error) is None else found for layer in layers]
            color, marker = looks[label]
            # Smaller and smaller: where formats have the same error, each can still be seen.
            width = 4 * 1.2 ** min(4, len(labels) - 1 - labels.index(label))
            (shown[label],) = axes.plot(errors, color=color, marker=marker, markersize=width, linewidth=1)
        axes.set(ylim=(-0.04, max(1.04, axes.get_ylim()[1])), xlim=(-0.6, len(layers) - 0.4), ylabel="|A−L| / |A|")
        axes.set_title(legible(amount), loc="left", fontsize=9)
        axes.grid(axis="y", color="#d0d0d0", linewidth=0.5)
        axes.set_axisbelow(True)
    figure.axes[-1].set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=7)
    title = f"{shortened(analysis.source.name, 40)}: relative error per layer"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=10)
    entries = [*labels, *(band for band in _BANDS if band in shown)]
    figure.legend([shown[entry] for entry in entries], map(legible, entries), loc="outside right upper", fontsize=8)
    return figure


def removal_figure(removal: Removal) -> Figure:
    """Return figure 6: how a layer's values are spread before and after its low-rank part is removed."""
    figure = Figure(figsize=(6.4, 3.8), dpi=DOTS_PER_INCH)
    figure.subplots_adjust(left=0.12, right=0.97, top=0.86, bottom=0.26)
    axes = figure.add_subplot()
    bins = len(removal.before.counts)
    edges = [removal.limit * (2 * place / bins - 1) for place in range(bins + 1)]
    for values, color, label in (
        (removal.before, _BEFORE, "before"),
        (removal.after, _AFTER, "after removing the low-rank part"),
    ):
        axes.stairs(values.counts, edges, fill=True, color=color, alpha=0.45)
        axes.stairs(values.counts, edges, color=color, linewidth=1.2, label=f"{label}\n{_kurtosis(values)}")
    axes.set(
        xlim=(-removal.limit, removal.limit),
        xlabel="value of a weight; the outermost bins hold all beyond",
        ylabel="values in each bin",
    )
    axes.set_ylim(0, 1.05 * max(*removal.before.counts, *removal.after.counts))
    layer = removal.layer
    facts = f"{layer.kind} {as_shape(layer.shape)}, low-rank part {removal.format}"
    axes.set_title(
        f"{shortened(layer.name, 72)}\n{facts}, relative error {as_error(removal.relative_error)}",
        fontsize=9,
        loc="left",
    )
    figure.legend(loc="lower center", ncols=2, fontsize=8)
    return figure


def _stacked(figure: Figure, count: int) -> list[Axes]:
    first = figure.add_subplot(count, 1, 1)
    others = [figure.add_subplot(count, 1, place, sharex=first) for place in range(2, count + 1)]
    stacked = [first, *others]
    for axes in stacked[:-1]:
        axes.tick_params(labelbottom=False)
    return stacked


def _band(row: AnalysisRow) -> str:
    spatial, pointwise, plain = _BANDS
    if len(row.layer.shape) < 3:
        return plain
    return spatial if math.prod(row.layer.shape[2:]) > 1 else pointwise


def _shade(axes: Axes, bands: Sequence[str]) -> dict[str, Artist]:
    shown: dict[str, Artist] = {}
    start = 0
    for band, members in groupby(bands):
        stop = start + len(list(members))
        axes.axvspan(start - 0.5, stop - 0.5, color=_BANDS[band], linewidth=0, zorder=0)
        shown[band] = Patch(facecolor=_BANDS[band], edgecolor="#b0b0b0", linewidth=0.5)
        start = stop
    return shown


def _kurtosis(values: Values) -> str:
    return "all values alike" if values.kurtosis is None else f"excess kurtosis {values.kurtosis:.2f}"


def _tick(name: str) -> str:
    return shortened(name.removesuffix(".weight"), _LABEL_LENGTH)
