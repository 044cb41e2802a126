"""The report of ``finetune``: as a document, as a table for a terminal, as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Group, RenderableType

from tcompress.errors import printable
from tcompress.report.documents import Document, head, stored, tail
from tcompress.report.evaluation import as_score
from tcompress.report.figures import as_bytes, as_seconds
from tcompress.report.markdown import escaped
from tcompress.report.tables import line, table
from tcompress.report.writing import json_text, write_whole
from tcompress.training.outcome import Scored
from tcompress.training.tuning import TuningResult


def tuning_document(result: TuningResult) -> Document:
    """Return the report of ``finetune``. dense is null without --against; history has a row for each epoch."""
    return {
        **head("finetune"),
        "task": result.task,
        "method": dict(result.method),
        "dense": None if result.dense is None else _scored(result.dense),
        "before": _scored(result.before),
        "after": _scored(result.after),
        "output": stored(result.output),
        "best_epoch": result.best_epoch,
        "steps": result.steps,
        **_rounds(result),
        "history": [row.to_plain() for row in result.rows],
        "device": result.device,
        "processes": result.processes,
        "precision": result.precision,
        "problem": result.problem,
        "notes": list(result.notes),
        **tail(result.seconds),
    }


def tuning_view(document: Document) -> RenderableType:
    """Show a report of ``finetune``: a line a figure, a column a model; then what there is to say."""
    columns = ["", *(name for name, _ in _models(document))]
    return Group(table(columns, _lines(document), right=columns[1:]), *map(line, _remarks(document)))


def tuning_markdown(document: Document) -> str:
    """Return the report of ``finetune`` as a Markdown page."""
    columns = ["", *(name for name, _ in _models(document))]
    names = list(document["before"]["scores"])
    lines = [
        f"# {document['tool']}: {escaped(document['output']['path'])}",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(map(escaped, cells))} |" for cells in _lines(document)),
        "",
        f"| epoch | step | loss | {' | '.join(map(escaped, names))} | |",
        f"|{'---|' * (len(names) + 4)}",
        *(f"| {' | '.join(map(escaped, cells))} |" for cells in _epochs(document, names)),
        "",
        *(f"- {escaped(remark)}" for remark in _remarks(document)),
    ]
    return "\n".join(lines) + "\n"


def write_tuning(path: Path, document: Document) -> None:
    """Write the report of ``finetune``, by its suffix. Raises OutputError when it cannot be written."""
    text = tuning_markdown(document) if path.suffix == ".md" else json_text(document)
    write_whole(path, text.encode("utf-8"))


def _scored(model: Scored) -> Document:
    return {"path": str(model.path), "bytes": model.nbytes, "scores": dict(model.scores)}


def _rounds(result: TuningResult) -> Document:
    """Return what a method that goes by rounds came to in each of them; nothing of another."""
    if not result.rounds:
        return {}
    found = [
        {**asdict(each), "layers": {name: list(pair) for name, pair in each.layers.items()}} for each in result.rounds
    ]
    return {"rounds": found}


def _models(document: Document) -> list[tuple[str, Document]]:
    named = (("dense", document["dense"]), ("compressed", document["before"]), ("tuned", document["after"]))
    return [(name, model) for name, model in named if model is not None]


def _lines(document: Document) -> Iterator[list[str]]:
    """Yield a figure's name and its value for each model."""
    models = [model for _, model in _models(document)]
    for name in dict.fromkeys(name for model in models for name in model["scores"]):
        scores = [model["scores"].get(name) for model in models]
        yield [name, *("" if score is None else as_score(score) for score in scores)]
    yield ["bytes", *(as_bytes(model["bytes"]) for model in models)]


def _epochs(document: Document, names: list[str]) -> Iterator[list[str]]:
    for row in document["history"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.4g}"
        scores = [as_score(row["scores"][name]) if name in row["scores"] else "" for name in names]
        yield [str(row["epoch"]), str(row["step"]), loss, *scores, "best so far" if row["best"] else ""]


def _remarks(document: Document) -> list[str]:
    processes = "" if document["processes"] == 1 else f" in {document['processes']} processes"
    where = f"{document['device']}{processes}, {document['precision']}"
    epochs = document["history"][-1]["epoch"]
    return [
        *(f"note: {printable(note)}" for note in document["notes"]),
        *map(_round, document.get("rounds", ())),
        f"{document['method']['name']}: {document['steps']} steps in {epochs} epoch(s) on {where}, "
        f"in {as_seconds(document['seconds'])}; epoch {document['best_epoch']} is written",
        f"wrote {printable(document['output']['path'])}",
    ]


def _round(found: Document) -> str:
    """Say what a round did: its layers, its bytes, its scores before and after training."""
    name, before = next(iter(found["before"].items()))
    layers = [f"{layer} {was or 'dense'} -> {became}" for layer, (was, became) in found["layers"].items()]
    after = as_score(found["after"][name])
    scores = f"{printable(name)} {as_score(before)} -> {after}"
    return f"round {found['number']}: {as_bytes(found['nbytes'])}, {scores}; {printable(', '.join(layers))}"
