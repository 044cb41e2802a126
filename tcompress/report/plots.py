"""Figures 5 and 6 of the low-rank-plus-sparse paper as PNG and SVG. The same figures always give the same bytes.

Names come from strangers: they are shown as text, never as markup, and files are named after what is harmless of them.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tcompress.errors import OutputError, printable
from tcompress.report.asked import split_asked
from tcompress.report.figures import as_error, as_shape
from tcompress.report.writing import write_whole
from tcompress.workflow.removal import Removal, Values
from tcompress.workflow.results import Analysis, AnalysisRow

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "tcompress",
    "text.parse_math": False,
}
# Okabe and Ito's colours, told apart by colour-blind readers too; markers help in print.
_LINES = tuple(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"), "osD^vPX", strict=True)
)
_BANDS = {"spatial convolution": "#ffffff", "pointwise convolution": "#fbe9c6", "linear, embedding": "#e4ecf2"}
_BEFORE, _AFTER = "#6b7f8f", "#ff7f0e"
_LABELS_SHOWN = 120
_LABEL_LENGTH = 44
_STEM_LENGTH = 80
_DOTS_PER_INCH = 120


def draw(analysis: Analysis, removals: Iterable[Removal], folder: Path) -> tuple[list[Path], list[str]]:
    """Draw the errors of all layers and what removing its low-rank part does to each: the files, and what is missing.

    Raises OutputError when they cannot be written.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", path=folder) from error
    files, notes, taken = [], [], {"errors"}
    with _style():
        files += _save(error_figure(analysis), folder / "errors")
        for removal in removals:
            if removal.reason is not None:
                notes.append(f"no figure of {removal.layer.name}: {removal.reason}")
                continue
            files += _save(removal_figure(removal), folder / _stem(removal.layer.name, taken))
    return files, notes


def error_figure(analysis: Analysis) -> Figure:
    """Return figure 5: the relative error of each layer, a panel for each amount and a line for each format."""
    layers = analysis.layers
    panels: dict[str, dict[str, dict[str, AnalysisRow]]] = {}
    for row in analysis.rows:
        label, amount = split_asked(row.asked)
        panels.setdefault(amount, {}).setdefault(label, {})[row.layer.name] = row
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    looks = {label: _LINES[position % len(_LINES)] for position, label in enumerate(labels)}
    every = math.ceil(len(layers) / _LABELS_SHOWN)
    ticks = {place: _tick(layers[place].name) for place in range(0, len(layers), every)}
    height = 0.8 + 0.075 * max(map(len, ticks.values())) + 2.1 * len(panels)
    size = (min(max(7.5, 3.5 + 0.17 * len(layers)), 30.0), height)
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
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
        axes.set_title(_legible(amount), loc="left", fontsize=9)
        axes.grid(axis="y", color="#d0d0d0", linewidth=0.5)
        axes.set_axisbelow(True)
    figure.axes[-1].set_xticks(list(ticks), list(ticks.values()), rotation=90, fontsize=7)
    title = f"{_shortened(analysis.source.name, 40)}: relative error per layer"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=10)
    entries = [*labels, *(band for band in _BANDS if band in shown)]
    figure.legend([shown[entry] for entry in entries], map(_legible, entries), loc="outside right upper", fontsize=8)
    return figure


def removal_figure(removal: Removal) -> Figure:
    """Return figure 6: how a layer's values are spread before and after its low-rank part is removed."""
    figure = Figure(figsize=(6.4, 3.8), dpi=_DOTS_PER_INCH)
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
        f"{_shortened(layer.name, 72)}\n{facts}, relative error {as_error(removal.relative_error)}",
        fontsize=9,
        loc="left",
    )
    figure.legend(loc="lower center", ncols=2, fontsize=8)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.style.context(["default", _STYLE]):
        yield


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
    return _shortened(name.removesuffix(".weight"), _LABEL_LENGTH)


def _shortened(name: str, length: int) -> str:
    """Return a name on one line, its middle left out where it is long: the end says more than the beginning."""
    name = _legible(name)
    front = length // 3
    return name if len(name) <= length else f"{name[:front]}…{name[front + 1 - length :]}"


def _legible(text: str) -> str:
    """Return text whose every character the font has: others as their escapes."""
    return printable(text).encode("latin-1", "backslashreplace").decode("latin-1")


def _stem(name: str, taken: set[str]) -> str:
    """Return a file name for a layer that no other layer has, on disks that take A for a as well."""
    wanted = "weights-" + re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_STEM_LENGTH]
    stem, count = wanted, 1
    while stem.lower() in taken:
        count += 1
        stem = f"{wanted}-{count}"
    taken.add(stem.lower())
    return stem


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, without what differs between two runs."""
    FigureCanvasAgg(figure)
    files = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, metadata=metadata)
        figure.set_layout_engine("none")  # the second file has the first one's layout, which takes longer than drawing
        files.append(path.with_name(f"{path.name}.{suffix}"))
        write_whole(files[-1], content.getvalue())
    return files
