"""Losses of steps: looked at in time, and what is said where one is no number or cannot be had."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tcompress.errors import NumericalError, SafetyError, TaskError
from tcompress.training.batches import samples_in
from tcompress.workflow.task import Task

_SMALLER = "smaller (--accumulate N keeps the step as large), or take --precision bf16"
_UNTOUCHED = "no gradient reaches any factor; compute it from model(...), without torch.no_grad() or detach()"


class Losses:
    """The losses of an epoch. A loss is looked at one step later: a device need not wait for the next step.

    tell: is given the number of each step and its loss when that is looked at.
    """

    def __init__(self, first: int, known: float, tell: Callable[[int, float], None]) -> None:
        self._tell = tell
        self.latest: float | None = None
        self._sum, self._count, self._pending = known, first, list[Tensor]()

    def add(self, loss: Tensor) -> None:
        """Take the loss of the next step. Raises NumericalError that names an earlier one."""
        self._look()
        self._pending.append(loss)

    def sum(self) -> float:
        """Return the sum of all. Raises as ``add``."""
        self._look()
        return self._sum

    def _look(self) -> None:
        for loss in self._pending:
            self._count += 1
            self.latest = float(loss)
            if not math.isfinite(self.latest):
                said = "NaN" if math.isnan(self.latest) else "infinite"
                raise NumericalError(f"step {self._count}: the loss is {said}; a smaller --lr may keep it finite")
            self._sum += self.latest
            self._tell(self._count, self.latest)
        self._pending.clear()


@contextmanager
def naming(task: Task, step: str, batch: Any) -> Iterator[None]:
    """Say at which step the user's code failed, and what to do where memory was not enough."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, TaskError) else error
        if cause is not None and _is_out_of_memory(cause):
            size = samples_in(batch)
            what = "a batch" if size is None else f"a batch of {size}"
            way_out = f"make the batches of {task.batches} {_SMALLER}"
            raise SafetyError(f"{step}: not enough memory for {what}; {way_out}", path=task.path) from cause
        if cause is not None and isinstance(error, TaskError):
            raise TaskError(f"{step}, with a batch of {task.batches}: {error.reason}", path=error.path) from cause
        raise


def require_gradient(loss: Tensor, task: Task) -> None:
    """Raise TaskError for a loss that hangs on nothing that learns."""
    if not loss.requires_grad:
        raise TaskError(f"loss has no gradient: {_UNTOUCHED}", path=task.path)


def untouched(task: Task) -> TaskError:
    """Return the error of a loss that hangs on something that learns, but not on the compressed layers."""
    return TaskError(f"loss does not touch the compressed layers: {_UNTOUCHED}", path=task.path)


def _is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device or the machine had not enough memory; the CPU's allocator has no exception of its own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
