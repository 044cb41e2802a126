"""The report of ``evaluate``: as a document, as a table for a terminal, as a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType

from tcompress.errors import printable
from tcompress.report.documents import Document, head, tail
from tcompress.report.figures import as_bytes, as_seconds
from tcompress.report.markdown import escaped
from tcompress.report.tables import line, table
from tcompress.report.writing import json_text, write_whole
from tcompress.workflow.evaluation import Evaluation, ModelFigures


def evaluation_document(result: Evaluation) -> Document:
    """Return the report of ``evaluate``. ``compressed_over_dense`` has a quotient for each figure, null by zero."""
    dense, compressed = _row(result.dense), _row(result.compressed)
    return {
        **head("evaluate"),
        "task": result.task,
        "inputs": result.inputs,
        "device": result.device,
        "threads": result.threads,
        "cache": result.cache,
        "rows": [dense, compressed],
        "compressed_over_dense": {
            key: _quotients(dense[key], compressed[key])
            for key in ("bytes", "scores", "latency_ms", "peak_memory_bytes", "peak_gpu_bytes")
        },
        "notes": list(result.notes),
        **tail(result.seconds),
    }


def evaluation_view(document: Document) -> RenderableType:
    """Show a report of ``evaluate``: a line a figure, a column a model."""
    columns = _columns(document)
    return Group(table(columns, _lines(document), right=columns[1:]), *map(line, _remarks(document)))


def evaluation_markdown(document: Document) -> str:
    """Return the report of ``evaluate`` as a Markdown page."""
    lines = [
        f"# {document['tool']}: {escaped(document['rows'][1]['path'])}",
        "",
        f"| {' | '.join(_columns(document))} |",
        "|---|---|---|---|",
        *(f"| {' | '.join(map(escaped, cells))} |" for cells in _lines(document)),
        "",
        *(f"- {escaped(remark)}" for remark in _remarks(document)),
    ]
    return "\n".join(lines) + "\n"


def write_evaluation(path: Path, document: Document) -> None:
    """Write the report of ``evaluate``, by its suffix. Raises OutputError when it cannot be written."""
    text = evaluation_markdown(document) if path.suffix == ".md" else json_text(document)
    write_whole(path, text.encode("utf-8"))


def _row(figures: ModelFigures) -> Document:
    return {
        "name": figures.name,
        "path": str(figures.path),
        "bytes": figures.nbytes,
        "scores": dict(figures.scores),
        "latency_ms": {str(size): median for size, median in figures.latency_ms.items()},
        "peak_memory_bytes": figures.peak_memory_bytes,
        "peak_gpu_bytes": figures.peak_gpu_bytes,
        "seconds": figures.seconds,
    }


def _quotients(dense: object, compressed: object) -> object:
    """Divide figure by figure; None where there is nothing to divide, or by."""
    if isinstance(dense, dict) and isinstance(compressed, dict):
        return {key: _quotients(dense[key], compressed[key]) for key in dense if key in compressed}
    if isinstance(dense, int | float) and isinstance(compressed, int | float) and dense != 0:
        return compressed / dense
    return None


def _columns(document: Document) -> list[str]:
    dense, compressed = document["rows"]
    return ["", dense["name"], compressed["name"], f"{compressed['name']} / {dense['name']}"]


def _lines(document: Document) -> Iterator[list[str]]:
    """Yield a figure's name, its two values, and their quotient, as words."""
    dense, compressed = document["rows"]
    quotients = document["compressed_over_dense"]
    for name in dict.fromkeys([*dense["scores"], *compressed["scores"]]):
        pair = [row["scores"].get(name) for row in (dense, compressed)]
        yield _cells(name, pair, quotients["scores"].get(name), as_score)
    yield _cells("bytes", [dense["bytes"], compressed["bytes"]], quotients["bytes"], as_bytes)
    for size, quotient in quotients["latency_ms"].items():
        pair = [row["latency_ms"][size] for row in (dense, compressed)]
        yield _cells(f"latency, batch {size}", pair, quotient, lambda median: f"{median:.3f} ms")
    for key, name in (("peak_memory_bytes", "peak memory"), ("peak_gpu_bytes", "peak GPU memory")):
        pair = [row[key] for row in (dense, compressed)]
        if pair != [None, None]:
            yield _cells(name, pair, quotients[key], as_bytes)


def _cells(name: str, pair: list[Any], quotient: float | None, shown: Callable[[Any], str]) -> list[str]:
    figures = ["" if figure is None else shown(figure) for figure in pair]
    return [name, *figures, "" if quotient is None else f"{quotient:.3f}"]


def as_score(score: float) -> str:
    """Return a score with four decimals, or in scientific notation where these say too little."""
    return f"{score:.4f}" if 1e-3 <= abs(score) < 1e5 or score == 0 else f"{score:.3e}"


def _remarks(document: Document) -> list[str]:
    dense, compressed = document["rows"]
    origin = "" if document["inputs"] is None else f", latency on the inputs of {document['inputs']}"
    return [
        *(f"note: {printable(note)}" for note in document["notes"]),
        f"evaluated {printable(dense['path'])} and {printable(compressed['path'])} on {document['device']} with "
        f"{document['threads']} thread(s), cache {document['cache']}{origin}, in {as_seconds(document['seconds'])}",
    ]
