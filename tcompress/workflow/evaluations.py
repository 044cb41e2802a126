"""Scores that were measured once: by what they are of, in a file beside a plan, so that no run measures them again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tcompress.errors import InputError, OutputError

_VERSION = 1
Scores = dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """A plan that was tried for a part of the dense bytes, and how much lower than dense its model scored."""

    keep: float
    stored_bytes: int
    score: float
    drop: float
    was_known: bool


@dataclass(frozen=True)
class Search:
    """All plans that were tried, in their order. score: its name."""

    score: str
    dense_score: float
    evaluated: Sequence[Evaluated]


class Evaluations:
    """path: of the file, None to remember within this run alone. It is written anew, whole, with every new score.

    Raises InputError for a file that holds no evaluations.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._scores: dict[str, Scores] = {} if path is None or not path.exists() else _read(path)

    def scores(self, of: Mapping[str, Any], measure: Callable[[], Scores]) -> tuple[Scores, bool]:
        """Return the scores, and whether they were known. of: all that they depend on, as JSON has it.

        Raises OutputError when the file cannot be written.
        """
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()
        if key in self._scores:
            return self._scores[key], True
        self._scores[key] = measure()
        if self._path is not None:
            _write(self._path, {"version": _VERSION, "scores": self._scores})
        return self._scores[key], False


def _read(path: Path) -> dict[str, Scores]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"is no record of evaluations ({error}); delete it, and they are made again", path=path
        ) from error
    match document:
        case {"version": int(version), "scores": {**found}} if version == _VERSION:
            scores = {str(key): _scores_of(each) for key, each in found.items()}
            known = {key: each for key, each in scores.items() if each is not None}
            if len(known) == len(scores):
                return known
    raise InputError("is no record of evaluations; delete it, and they are made again", path=path)


def _scores_of(found: object) -> Scores | None:
    """Return scores as a file has them; None for anything else."""
    if not isinstance(found, dict) or not found or not all(type(score) in {int, float} for score in found.values()):
        return None
    return {str(name): float(score) for name, score in found.items()}


def _write(path: Path, document: Mapping[str, Any]) -> None:
    draft = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        draft.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", "utf-8")
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
