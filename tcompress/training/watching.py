"""How a training run says where it is: one call a step, to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """After a step. epochs: None where steps alone say when it ends. score: the latest, by its name."""

    epoch: int
    epochs: int | None
    step: int
    steps: int
    loss: float | None
    score: tuple[str, float]


Watch = Callable[[Moment], None]


def unwatched(moment: Moment) -> None:
    """Show nothing."""
    del moment
