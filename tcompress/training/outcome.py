"""What models score, where a run is, what was best so far, and what it came to in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.training.history import Row


@dataclass(frozen=True)
class Scored:
    """A model with its bytes on disk and its scores."""

    path: Path
    nbytes: int
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Position:
    """How far a run is. steps_of_epoch: already made in the epoch that is under way. losses: their sum.

    idle: epochs without a better score. seconds: of training, over all starts.
    """

    epoch: int = 1
    step: int = 0
    steps_of_epoch: int = 0
    losses: float = 0.0
    idle: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Best:
    """The best epoch, 0 for the model as it came, and its state dict on the CPU."""

    epoch: int
    scores: Mapping[str, float]
    values: Mapping[str, Tensor]

    @property
    def score(self) -> tuple[str, float]:
        """The name and the value of the first score."""
        return next(iter(self.scores.items()))

    def to_plain(self) -> dict[str, Any]:
        """Return it as what its constructor takes."""
        return {"epoch": self.epoch, "scores": dict(self.scores), "values": self.values}


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    best: None where no epoch was one that may be written. problem: why it ended before its time, None where it did not.
    resumed_at: a step, or None.
    """

    best: Best | None
    rows: tuple[Row, ...]
    steps: int
    seconds: float
    problem: str | None
    resumed_at: int | None


@dataclass(frozen=True)
class Trained:
    """One training of one compressed checkpoint, whose draft is written.

    dense, before, after: scores of the dense model, None where there is none, of the compressed one as it came, and of
    what was written. steps, seconds: of training, over all starts.
    """

    rows: tuple[Row, ...]
    best_epoch: int
    steps: int
    seconds: float
    problem: str | None
    dense: Scored | None
    before: Mapping[str, float]
    after: Mapping[str, float]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Round:
    """A round that compresses and trains. nbytes, before, after: bytes on disk and scores, before and after training.

    layers: what the layers that it compressed were, None for dense, and what they became.
    """

    number: int
    nbytes_before: int
    nbytes: int
    before: Mapping[str, float]
    after: Mapping[str, float]
    layers: Mapping[str, tuple[str | None, str]]


class NothingBetterError(NumericalError):
    """A loss was not finite before any epoch was better than the model as it came. problem: which loss."""

    def __init__(self, problem: str, *, path: Path) -> None:
        super().__init__(f"{problem}; nothing was written, no epoch was better", path=path)
        self.problem = problem
