"""Results as documents: plain JSON values under keys that stay, described in the README.

Every document has "schema": 1, "command" and "tool".
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tcompress.formats import FORMATS
from tcompress.version import __version__
from tcompress.workflow.results import (
    Analysis,
    AnalysisRow,
    CompressionResult,
    DecompressionResult,
    Inspection,
    LayerResult,
    Repairs,
    Stored,
    VerificationResult,
    Winner,
    peak_memory_bytes,
)
from tcompress.workflow.settings import TYPE_NAMES

SCHEMA = 1
Document = dict[str, Any]


def compression_document(result: CompressionResult, exceeded: list[str]) -> Document:
    """Return the report of ``compress``; ``exceeded`` says which limits of the user were."""
    compressed = [layer for layer in result.layers if layer.format is not None]
    return {
        **head("compress"),
        "dry_run": result.output is None,
        "source": stored(result.source),
        "output": None if result.output is None else stored(result.output),
        "plan": dict(result.plan),
        "layers": [_layer(layer) for layer in result.layers],
        "totals": {
            "dense_bytes": result.source.nbytes,
            "stored_bytes": result.stored_bytes,
            "exact_bytes": result.exact_bytes,
            "compression_ratio": result.compression_ratio,
            "layers": len(result.layers),
            "compressed_layers": len(compressed),
            "compressed_dense_bytes": sum(layer.layer.dense_bytes for layer in compressed),
            "compressed_stored_bytes": sum(layer.stored_bytes for layer in compressed),
            "largest_relative_error": None if result.output is None else result.largest_error,
        },
        "repairs": None if result.repairs is None else _repairs(result.repairs),
        "limits_exceeded": exceeded,
        "other_values": list(result.other_values),
        "notes": [*result.notes, *_growth(result)],
        **tail(result.seconds),
    }


def analysis_document(analysis: Analysis, *, plots: Sequence[Path] = (), notes: Sequence[str] = ()) -> Document:
    """Return the report of ``analyze``; plots: the files drawn, notes: which layers could not be."""
    return {
        **head("analyze"),
        "source": {"path": str(analysis.source)},
        "asked": list(analysis.asked),
        "rows": [_analysis_row(row) for row in analysis.rows],
        "break_even": {
            layer: {name: None if limit is None else limit.options() for name, limit in limits.items()}
            for layer, limits in analysis.break_even.items()
        },
        "best": [_winner(winner) for winner in analysis.best],
        "plots": [str(path) for path in plots],
        "notes": [*analysis.notes, *notes],
        **tail(analysis.seconds),
    }


def inspection_document(inspection: Inspection) -> Document:
    """Return the report of ``inspect``."""
    return {
        **head("inspect"),
        "path": str(inspection.path),
        "files": list(inspection.files),
        "file_bytes": inspection.file_bytes,
        "tensors": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "dense_bytes": row.dense_bytes,
                "stored_bytes": row.stored_bytes,
                "kind": row.kind,
                "format": row.format,
                "options": {} if row.setting is None else row.setting.options(),
                "stored_dtype": None if row.store is None else TYPE_NAMES[row.store],
                "relative_error": row.relative_error,
                "tied_to": row.tied_to,
            }
            for row in inspection.rows
        ],
        "metadata": dict(inspection.metadata),
        "manifest": None if inspection.manifest is None else dict(inspection.manifest),
        "key": inspection.key,
        "other_values": list(inspection.other_values),
    }


def decompression_document(result: DecompressionResult) -> Document:
    """Return the report of ``decompress``."""
    return {
        **head("decompress"),
        "source": stored(result.source),
        "output": stored(result.output),
        "tensors": result.tensors,
        "rebuilt": result.rebuilt,
        **tail(result.seconds),
    }


def verification_document(result: VerificationResult) -> Document:
    """Return the report of ``verify``."""
    return {
        **head("verify"),
        "path": str(result.path),
        "against": result.against,
        "passed": not result.problems,
        "problems": list(result.problems),
        "layers": [
            {"name": layer.name, "reported_error": layer.reported_error, "measured_error": layer.measured_error}
            for layer in result.layers
        ],
        "repaired": list(result.repaired),
        **tail(result.seconds),
    }


def formats_document() -> Document:
    """Return the list of all formats, as ``formats`` shows it."""
    return {
        **head("formats"),
        "formats": [
            {
                "name": format_type.name,
                "summary": format_type.summary,
                "options": format_type.option_defaults(),
                "size_option": format_type.size_option,
                "rebuild": format_type.rebuild,
                "reference": format_type.reference,
            }
            for format_type in FORMATS.values()
        ],
    }


def head(command: str) -> Document:
    """Return what every document begins with."""
    return {"schema": SCHEMA, "command": command, "tool": f"tcompress {__version__}"}


def tail(seconds: float) -> Document:
    """Return what every document of work ends with."""
    return {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}


def stored(found: Stored) -> Document:
    """Return where a checkpoint lies, its files, bytes and hash."""
    return {"path": str(found.path), "files": list(found.files), "bytes": found.nbytes, "sha256": found.sha256}


def _layer(result: LayerResult) -> Document:
    return {
        "name": result.layer.name,
        "kind": str(result.layer.kind),
        "shape": list(result.layer.shape),
        "dtype": result.layer.dtype.name,
        "format": "dense" if result.format is None else result.format.name,
        "options": {} if result.format is None else result.format.options(),
        "stored_dtype": None if result.store is None else TYPE_NAMES[result.store],
        "dense_bytes": result.layer.dense_bytes,
        "stored_bytes": result.stored_bytes,
        "relative_error": result.relative_error,
        "output_error": result.output_error,
        "seconds": result.seconds,
        "reason": result.reason,
        "notes": list(result.notes),
    }


def _growth(result: CompressionResult) -> list[str]:
    """Say that the output is larger than its source, if it is."""
    more = result.stored_bytes - result.source.nbytes
    if more <= 0:
        return []
    sure = "is" if result.output is not None else "would be"
    how_much = f"{sure} {more}" if result.exact_bytes else f"may be up to {more}"
    return [f"the output {how_much} bytes LARGER than its source: descriptions take more than the layers save"]


def _repairs(repairs: Repairs) -> Document:
    return {
        "tensors": list(repairs.names),
        "modules": repairs.modules,
        "held_out": repairs.held_out,
        "distance_before": repairs.before,
        "distance_after": repairs.after,
    }


def _analysis_row(row: AnalysisRow) -> Document:
    return {
        "name": row.layer.name,
        "kind": str(row.layer.kind),
        "shape": list(row.layer.shape),
        "dtype": row.layer.dtype.name,
        "asked": row.asked,
        "format": None if row.format is None else row.format.name,
        "options": None if row.format is None else row.format.options(),
        "dense_bytes": row.layer.dense_bytes,
        "stored_bytes": row.stored_bytes,
        "relative_error": row.relative_error,
        "seconds": row.seconds,
        "verdict": row.verdict,
        "worthwhile": row.worthwhile,
        "structure": row.structure,
        "notes": list(row.notes),
    }


def _winner(winner: Winner) -> Document:
    row = _analysis_row(winner.row)
    kept = ("asked", "format", "options", "stored_bytes", "relative_error")
    return {"name": row["name"], "keep": winner.keep, "family": winner.family, **{key: row[key] for key in kept}}
