"""What ``plan`` found, as a document and as a table."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType

from tcompress.errors import UsageError, listed, printable
from tcompress.report.documents import Document, head, tail
from tcompress.report.figures import as_bytes, as_error, as_seconds, as_shape
from tcompress.report.tables import line, setting_text, table
from tcompress.workflow.budgeting import Planned, PlannedLayer
from tcompress.workflow.evaluations import Search
from tcompress.workflow.settings import TYPE_NAMES
from tcompress.workflow.trial import Candidate


def planning_document(source: Path, planned: Planned, explain: str | None = None) -> Document:
    """Return the report of ``plan``. explain: a layer whose whole curve is to be in it.

    Raises UsageError when there is no such layer.
    """
    curve = None if explain is None else _curve_of(planned, explain)
    return {
        **head("plan"),
        "source": {"path": str(source)},
        "plan": planned.plan.to_json(),
        "budget": dict(planned.budget),
        "budget_bytes": None if "flops" in planned.budget else planned.limit,
        "layers": [_layer(each) for each in planned.layers],
        "totals": {
            "dense_bytes": sum(each.layer.dense_bytes for each in planned.layers),
            "stored_bytes": sum(each.chosen.stored_bytes for each in planned.layers),
            "header_bytes": sum(each.chosen.header_bytes for each in planned.layers),
            "dense_multiplications": sum(each.dense_multiplications for each in planned.layers),
            "multiplications": sum(each.multiplications for each in planned.layers),
            "loss": planned.loss,
            "least_loss": planned.bound,
        },
        "curve": curve,
        "search": None if planned.search is None else _search(planned.search),
        "notes": list(planned.notes),
        **tail(planned.seconds),
    }


def planning_view(document: Document) -> RenderableType:
    """Show a report of ``plan``: a row a layer, or the curve that was asked for, then the totals."""
    totals = document["totals"]
    part = totals["stored_bytes"] / totals["dense_bytes"]
    lines = [
        *(f"note: {printable(note)}" for note in document["notes"]),
        f"planned {len(document['layers'])} layers: {totals['dense_bytes']} -> {totals['stored_bytes']} bytes "
        f"({part:.2%}), {_share(totals)} of the multiplications, loss {totals['loss']:.4g}, "
        f"no plan below {totals['least_loss']:.4g}, in {as_seconds(document['seconds'])}",
    ]
    if document["curve"] is not None:
        columns = ["format", "stored as", "stored", "error", ""]
        rows = [[*_cells(each), "chosen" if each["chosen"] else ""] for each in document["curve"]]
        return Group(table(columns, rows, right=["stored", "error"]), *map(line, lines))
    columns = ["layer", "kind", "shape", "dtype", "format", "stored as", "stored", "error", "importance"]
    rows = [
        [
            each["name"],
            each["kind"],
            as_shape(each["shape"]),
            each["dtype"],
            *_cells(each),
            f"{each['importance']:.3g}",
        ]
        for each in document["layers"]
    ]
    return Group(table(columns, rows, right=columns[6:]), *map(line, lines))


def _share(totals: Document) -> str:
    dense = totals["dense_multiplications"]
    return f"{totals['multiplications'] / dense if dense else 1:.1%}"


def _search(search: Search) -> Document:
    return {
        "score": search.score,
        "dense_score": search.dense_score,
        "evaluated": [asdict(each) for each in search.evaluated],
    }


def _cells(each: Document) -> list[str]:
    return [
        setting_text(each),
        each["stored_dtype"] or "",
        as_bytes(each["stored_bytes"]),
        as_error(each["expected_error"]),
    ]


def _layer(planned: PlannedLayer) -> Document:
    layer = planned.layer
    return {
        "name": layer.name,
        "kind": str(layer.kind),
        "shape": list(layer.shape),
        "dtype": layer.dtype.name,
        "dense_bytes": layer.dense_bytes,
        **_candidate(planned.chosen),
        "multiplications": planned.multiplications,
        "dense_multiplications": planned.dense_multiplications,
        "importance": planned.importance,
        "why": planned.why,
    }


def _candidate(candidate: Candidate) -> Document:
    setting, store = candidate.format, candidate.store
    return {
        "format": "dense" if setting is None else setting.name,
        "options": {} if setting is None else setting.options(),
        "stored_dtype": None if store is None else TYPE_NAMES[store],
        "stored_bytes": candidate.stored_bytes,
        "header_bytes": candidate.header_bytes,
        "expected_error": math.sqrt(candidate.loss),
    }


def _curve_of(planned: Planned, name: str) -> list[Document]:
    for each in planned.layers:
        if each.layer.name == name:
            ordered = sorted(each.curve, key=lambda candidate: (candidate.stored_bytes, candidate.loss))
            return [
                {**_candidate(candidate), "fitted": candidate.is_fitted, "chosen": candidate is each.chosen}
                for candidate in ordered
            ]
    known = listed([each.layer.name for each in planned.layers])
    raise UsageError(f"--explain: there is no layer {name}; there are {known}")
