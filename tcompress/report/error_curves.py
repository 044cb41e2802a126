"""The curves of ``analyze --curves`` as a document, and as a table of what bytes an error takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType

from tcompress.errors import printable
from tcompress.report.documents import Document
from tcompress.report.tables import Cell, line, table
from tcompress.workflow.error_curves import ERRORS, CurvePoint, ErrorCurve, Needed


def curves_document(curves: Sequence[ErrorCurve]) -> list[Document]:
    """Return the curves for the document of ``analyze``."""
    return [
        {
            "name": curve.layer.name,
            "format": curve.format,
            "dense_bytes": curve.layer.dense_bytes,
            "exact": curve.is_exact,
            "error_of": "output" if curve.of_output else "weight",
            "reason": curve.reason,
            "points": list(map(_point, curve.points)),
            "needed": list(map(_needed, curve.needed)),
        }
        for curve in curves
    ]


def _point(point: CurvePoint) -> Document:
    return {
        "options": point.setting.options(),
        "fraction": point.fraction,
        "stored_bytes": point.stored_bytes,
        "error": point.error,
        "error_at_least": point.lower,
        "control": point.control,
        "control_at_least": point.control_lower,
    }


def _needed(needed: Needed) -> Document:
    return {
        "error": needed.error,
        "stored_bytes": needed.stored_bytes,
        "control_stored_bytes": needed.control_bytes,
    }


def curves_view(curves: Sequence[Document]) -> RenderableType:
    """Show how many bytes each error takes, layer by layer and format by format."""
    rows: list[list[Cell]] = []
    named = ""
    for curve in curves:
        if curve["reason"] is None:
            name, named = ("" if curve["name"] == named else curve["name"]), curve["name"]
            shares = [
                _share(each[key], curve["dense_bytes"])
                for each in curve["needed"]
                for key in ("stored_bytes", "control_stored_bytes")
            ]
            rows.append([name, curve["format"], *shares])
    figures = [column for error in ERRORS for column in (f"error {error:g}", f"shuffled {error:g}")]
    return Group(table(["layer", "format", *figures], rows, right=figures), *map(line, _legend(curves)))


def _share(nbytes: int | None, dense: int) -> str:
    return "larger" if nbytes is None or nbytes >= dense else f"{nbytes / dense:.1%}"


def _legend(curves: Sequence[Document]) -> list[str]:
    outputs = {curve["name"] for curve in curves if curve["error_of"] == "output"}
    names = {curve["name"] for curve in curves}
    lines = ["part of its bytes at which a layer has this relative error; shuffled: its values in random order"]
    if outputs:
        lines.append(f"errors are those of the outputs of {len(outputs)} of {len(names)} layers, of weights else")
    bounded = _listed(curve["format"] for curve in curves if not curve["exact"] and curve["reason"] is None)
    if bounded:
        lines.append(f"{bounded}: at most so many bytes, by a bound of what truncations lose together")
    reasons: dict[tuple[str, str], int] = {}
    for curve in curves:
        if curve["reason"] is not None:
            key = curve["format"], curve["reason"]
            reasons[key] = reasons.get(key, 0) + 1
    return lines + [
        f"note: no curve of {printable(name)} for {count} of {len(names)} layers: {printable(reason)}"
        for (name, reason), count in reasons.items()
    ]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(names))
