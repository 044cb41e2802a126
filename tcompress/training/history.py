"""What each epoch came to, a row an epoch, as a file that is written anew with every one.

It belongs to a run that wrote an output, or can go on to one.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tcompress.errors import OutputError, UsageError, printable
from tcompress.training.state import write_whole

SUFFIXES = (".csv", ".json")
_COLUMNS = ("epoch", "step", "loss", "lr", "seconds", "best")
_OF_ROUNDS = {"round": "round", "nbytes": "bytes"}  # fields that few methods have, and their columns
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would take a name for


@dataclass(frozen=True)
class Row:
    """One epoch; 0 is the model as it was compressed, without a loss. best: whether it was, up to then.

    round, nbytes: of a method that goes by rounds, its number and the bytes that it starts with. The first row of a
    later round, the model as it was compressed further, has the number of the epoch before.
    """

    epoch: int
    step: int
    loss: float | None
    lr: float
    seconds: float
    best: bool
    scores: Mapping[str, float]
    round: int | None = None
    nbytes: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the fields, those of rounds where there are some."""
        return {name: value for name, value in asdict(self).items() if name not in _OF_ROUNDS or value is not None}


def check_history(path: Path | None) -> None:
    """Raise UsageError or OutputError when no history could be written there."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--history must end with {' or '.join(SUFFIXES)}", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", path=path)


@contextmanager
def history_in(path: Path | None, workspace: Path) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Give what writes the rows of a run so far, to no file without a path.

    workspace: of the run's output. A run that fails and does not leave it, to go on from, leaves the file as it was.
    """
    # Where there is a workspace already the run may go on from it, and the file be its own.
    before = path.read_bytes() if path is not None and path.is_file() and not workspace.exists() else None
    is_written = False

    def write(rows: Sequence[Row]) -> None:
        nonlocal is_written
        if path is not None:
            write_history(path, rows)
            is_written = True

    try:
        yield write
    except BaseException:
        if path is not None and is_written and not workspace.exists():
            if before is None:
                path.unlink(missing_ok=True)
            else:
                write_whole(path, lambda file: file.write(before))
        raise


def write_history(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, by the suffix as CSV or JSON. Raises OutputError when the file cannot be written."""
    text = as_json(rows) if path.suffix == ".json" else as_csv(rows)
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def as_json(rows: Sequence[Row]) -> str:
    """Return a list of objects."""
    return json.dumps([row.to_plain() for row in rows], indent=2, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """Return a table with a column for each score, named as it is."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    of_rounds = {name: column for name, column in _OF_ROUNDS.items() if any(getattr(row, name) for row in rows)}
    writer.writerow([*_COLUMNS, *of_rounds.values(), *map(_as_cell, names)])
    for row in rows:
        values = (getattr(row, name) for name in (*_COLUMNS, *of_rounds))
        first: list[Any] = ["" if value is None else value for value in values]
        writer.writerow([*first, *(row.scores.get(name, "") for name in names)])
    return text.getvalue()


def _as_cell(name: str) -> str:
    return f"'{printable(name)}" if name.startswith(_FORMULA) else printable(name)
