"""What each epoch came to, a row an epoch, as a file that is written anew with every one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tcompress.errors import OutputError, UsageError, printable
from tcompress.training.state import write_whole

SUFFIXES = (".csv", ".json")
_COLUMNS = ("epoch", "step", "loss", "lr", "seconds", "best")
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would take a name for


@dataclass(frozen=True)
class Row:
    """One epoch; 0 is the model as it was compressed, without a loss. best: whether it was, up to then."""

    epoch: int
    step: int
    loss: float | None
    lr: float
    seconds: float
    best: bool
    scores: Mapping[str, float]


def check_history(path: Path | None) -> None:
    """Raise UsageError or OutputError when no history could be written there."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--history must end with {' or '.join(SUFFIXES)}", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", path=path)


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, by the suffix as CSV or JSON. Raises OutputError when the file cannot be written."""
    text = as_json(rows) if path.suffix == ".json" else as_csv(rows)
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def as_json(rows: Sequence[Row]) -> str:
    """Return a list of objects."""
    return json.dumps([asdict(row) for row in rows], indent=2, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Return a table with a column for each score, named as it is."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *map(_as_cell, names)])
    for row in rows:
        first: list[Any] = ["" if value is None else value for value in (getattr(row, name) for name in _COLUMNS)]
        writer.writerow([*first, *(row.scores.get(name, "") for name in names)])
    return text.getvalue()


def _as_cell(name: str) -> str:
    return f"'{printable(name)}" if name.startswith(_FORMULA) else printable(name)
