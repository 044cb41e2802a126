"""The curves of ``analyze --curves`` as figures: one a layer, a panel for each format."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from tcompress.report.drawing import DOTS_PER_INCH, LINES, legible, make_folder, save, shortened, stem_of, styled
from tcompress.report.figures import as_shape
from tcompress.workflow.error_curves import CurvePoint, ErrorCurve

_COLUMNS = 3
_CONTROL = "#808080"
_SMALLEST, _LARGEST = 1e-2, 1.15  # errors in view: smaller ones are of no use to compression
_NARROWEST = 1e-3  # part of the bytes


def draw_curves(curves: Iterable[ErrorCurve], folder: Path) -> list[Path]:
    """Draw the curves of each layer that has some into a folder: the files. Raises OutputError as ``save``."""
    make_folder(folder)
    files: list[Path] = []
    taken: set[str] = set()
    with styled():
        for layer, own in groupby((each for each in curves if each.points), key=lambda curve: curve.layer):
            files += save(curve_figure(list(own)), folder / stem_of("curves", layer.name, taken))
    return files


def curve_figure(curves: Sequence[ErrorCurve]) -> Figure:
    """Return the figure of one layer: error over part of its bytes, both logarithmic; the control dashed in grey."""
    columns = min(_COLUMNS, len(curves))
    rows = math.ceil(len(curves) / columns)
    size = (max(4.6, 0.6 + 2.6 * columns), 1.3 + 2.2 * rows)
    figure = Figure(figsize=size, dpi=DOTS_PER_INCH, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    narrowest = min(_part(curve, point) for curve in curves for point in curve.points)
    for position, axes in enumerate(panels.flat):
        if position >= len(curves):
            axes.remove()
            continue
        _draw(axes, curves[position], LINES[position % len(LINES)][0])
        axes.set(xscale="log", yscale="log", xlim=(max(_NARROWEST, narrowest / 1.2), 1.2), ylim=(_SMALLEST, _LARGEST))
        axes.tick_params(labelbottom=position + columns >= len(curves))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda part, _: f"{100 * part:g}%"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{error:g}"))
    first = curves[0]
    of_what = "output" if first.of_output else "weight"
    figure.supxlabel("part of the layer's bytes", fontsize=9)
    figure.supylabel(f"relative error of the {of_what}", fontsize=9)
    title = f"{shortened(first.layer.name, 60)}\n{first.layer.kind} {as_shape(first.layer.shape)}"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=9)
    return figure


def _draw(axes: Axes, curve: ErrorCurve, color: str) -> None:
    parts = [_part(curve, point) for point in curve.points]
    for errors, least, shade, style, label in (
        ([p.error for p in curve.points], [p.lower for p in curve.points], color, "-", "as it is"),
        ([p.control for p in curve.points], [p.control_lower for p in curve.points], _CONTROL, "--", "shuffled"),
    ):
        axes.plot(parts, _visible(errors), color=shade, linestyle=style, linewidth=1.4, label=label)
        if not curve.is_exact:
            axes.fill_between(parts, _visible(least), _visible(errors), color=shade, alpha=0.15, linewidth=0)
    title = legible(curve.format) + ("" if curve.is_exact else " (at most; band: at least)")
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(color="#d0d0d0", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", fontsize=7)


def _part(curve: ErrorCurve, point: CurvePoint) -> float:
    return point.stored_bytes / curve.layer.dense_bytes


def _visible(errors: Sequence[float]) -> list[float]:
    """Return errors that a logarithmic axis can hold: 0 lies below all that is in view."""
    return [max(error, _SMALLEST / 10) for error in errors]
