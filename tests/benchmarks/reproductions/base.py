"""What a reproduction is given, and what it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Conditions:
    """folder: an empty one, for files. seed: of all that is random. epochs: None for the reproduction's own number."""

    folder: Path
    seed: int
    epochs: int | None


@dataclass(frozen=True)
class Row:
    """One figure. run: what was trained or compressed. paper: the same figure as the source has it."""

    run: str
    figure: str
    measured: str
    paper: str
    source: str


@dataclass(frozen=True)
class Reproduction:
    """One table or claim. setting: what was done, and where the source does not say what it did."""

    title: str
    setting: str
    rows: Callable[[Conditions], Iterator[Row]]
