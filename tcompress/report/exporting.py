"""The report of ``export``: as a document, as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType

from tcompress.errors import printable
from tcompress.report.documents import Document, head, stored, tail
from tcompress.report.figures import as_error, as_seconds, as_shape
from tcompress.report.tables import line, table
from tcompress.workflow.exporting import ExportResult


def export_document(result: ExportResult) -> Document:
    """Return the report of ``export``. ``differences`` has one by batch size."""
    return {
        **head("export"),
        "source": stored(result.source),
        "task": result.task,
        "inputs": result.inputs,
        "output": {"path": str(result.path), "bytes": result.nbytes},
        "dense_bytes": result.dense_bytes,
        "layers": [
            {
                "name": layer.name,
                "format": layer.format,
                "shape": list(layer.shape),
                "weights": "factors" if layer.reason is None else "dense",
                "reason": layer.reason,
                "multiplications": layer.operations,
                "dense_multiplications": layer.dense_operations,
            }
            for layer in result.layers
        ],
        "opset": result.opset,
        "operators": dict(result.operators),
        "differences": {str(size): difference for size, difference in result.differences.items()},
        "largest_difference": max(result.differences.values()),
        "allowed_difference": result.allowed,
        "notes": list(result.notes),
        **tail(result.seconds),
    }


def export_view(document: Document) -> RenderableType:
    """Show a report of ``export``: a row a compressed layer, then the graph and the check."""
    rows = [
        [
            layer["name"],
            as_shape(layer["shape"]),
            layer["format"],
            layer["weights"],
            str(layer["multiplications"]),
            str(layer["dense_multiplications"]),
        ]
        for layer in document["layers"]
    ]
    columns = ["layer", "shape", "format", "weights", "multiplications", "dense"]
    return Group(table(columns, rows, right=columns[4:]), *map(line, _remarks(document)))


def _remarks(document: Document) -> list[str]:
    dense = [layer for layer in document["layers"] if layer["reason"]]
    lines = [f"dense weight: {printable(layer['name'])}: {layer['reason']}" for layer in dense[:20]]
    lines += [f"... and {len(dense) - 20} more layers have dense weights, see --json"] if len(dense) > 20 else []
    lines += [f"note: {printable(note)}" for note in document["notes"]]
    operators = ", ".join(f"{count} {name}" for name, count in document["operators"].items())
    sizes = " and ".join(document["differences"])
    return [
        *lines,
        f"graph of {sum(document['operators'].values())} operators, opset {document['opset']}: {operators}",
        f"ONNX Runtime and torch differ by {as_error(document['largest_difference'])} of the largest value at most "
        f"(batch size {sizes}, inputs of {document['inputs']})",
        f"wrote {printable(document['output']['path'])}: {document['output']['bytes']} bytes; compressed checkpoint "
        f"{document['source']['bytes']}, dense weights {document['dense_bytes']}; in {as_seconds(document['seconds'])}",
    ]
