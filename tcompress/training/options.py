"""How long a model is trained, on what, and how fast it learns; what is not said is each method's own."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from tcompress.errors import UsageError

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Defaults:
    """What a method does where nothing is said. lr: of the default optimizer, AdamW."""

    epochs: int
    lr: float


@dataclass(frozen=True)
class TrainingOptions:
    """All that is the same for every method.

    epochs: passes over the batches. steps: changes of the parameters, at most, in as many epochs as that takes if none
    are given. lr: the highest learning rate of the default optimizer. max_hours: of training; what is best by then is
    written. patience: epochs without a better score after which training ends. precision: of the computation, not of
    the parameters, which are float32. accumulate: batches for one step. save_every: minutes between saved states.
    device: None for what Accelerate finds. None elsewhere: the method's default, or no limit.

    Raises UsageError for what makes no sense.
    """

    epochs: int | None = None
    steps: int | None = None
    lr: float | None = None
    seed: int = 0
    max_hours: float | None = None
    patience: int | None = None
    precision: str = "fp32"
    accumulate: int = 1
    save_every: float = 10.0
    device: torch.device | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "patience", "accumulate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        for name in ("lr", "max_hours", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision: {self.precision!r} is none of {', '.join(PRECISIONS)}")


def require_accelerate() -> None:
    """Raise UsageError where the packages that training needs are not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise UsageError("training needs accelerate: pip install 'tcompress[train]'")
