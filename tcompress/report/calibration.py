"""The report of ``calibrate``: as a document, as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType

from tcompress.errors import printable
from tcompress.report.documents import Document, head, stored, tail
from tcompress.report.figures import as_bytes, as_seconds
from tcompress.report.tables import line, table
from tcompress.workflow.calibration import Calibration

_SHOWN = 20
_OBJECTIVES = {"loss": "of the task's loss", "output": "of the model's output, without labels"}


def calibration_document(result: Calibration) -> Document:
    """Return the report of ``calibrate``. ``diagonal`` tells that of a layer's moment there is nothing else."""
    found = result.statistics
    return {
        **head("calibrate"),
        "source": stored(result.source),
        "task": result.task,
        "output": stored(result.output),
        "sensitivity_of": found.sensitivity_of,
        "batches": found.batches,
        "positions": sum(layer.positions for layer in found.layers.values()),
        "layers": [
            {
                "name": name,
                "kind": str(layer.kind),
                "fan_in": layer.fan_in,
                "diagonal": layer.diagonal,
                "positions": layer.positions,
            }
            for name, layer in found.layers.items()
        ],
        "untraced": [{"name": name, "reason": reason} for name, reason in found.untraced.items()],
        "spilled": list(found.spilled),
        "notes": list(found.notes),
        **tail(result.seconds),
    }


def calibration_view(document: Document) -> RenderableType:
    """Show a report of ``calibrate``: a row a layer in the order of their calls, then what was left out."""
    rows = [
        [layer["name"], layer["kind"], str(layer["fan_in"]), _moment(layer), str(layer["positions"])]
        for layer in document["layers"]
    ]
    columns = ["layer", "kind", "inputs", "moment", "positions"]
    return Group(table(columns, rows, right=["inputs", "positions"]), *map(line, _remarks(document)))


def _moment(layer: Document) -> str:
    if layer["kind"] == "embedding":
        return "counts"
    return "diagonal" if layer["diagonal"] else "full"


def _remarks(document: Document) -> list[str]:
    left_out = document["untraced"]
    lines = [f"left out: {printable(layer['name'])}: {layer['reason']}" for layer in left_out[:_SHOWN]]
    if len(left_out) > _SHOWN:
        lines.append(f"... and {len(left_out) - _SHOWN} more layers left out, see --json")
    lines += [f"note: {printable(note)}" for note in document["notes"]]
    if document["spilled"]:
        lines.append(f"note: moments summed in temporary files: {', '.join(map(printable, document['spilled']))}")
    return [
        *lines,
        f"{len(document['layers'])} layers on {document['batches']} batches; sensitivities are those "
        f"{_OBJECTIVES[document['sensitivity_of']]}",
        f"wrote {printable(document['output']['path'])}: {as_bytes(document['output']['bytes'])}, "
        f"in {as_seconds(document['seconds'])}",
    ]
