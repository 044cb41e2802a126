"""What every method gives the engine: a loss to be made smaller, and what is to be done between epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tcompress.training.options import Defaults
from tcompress.workflow.task import Task


class Objective(ABC):
    """What is minimised."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch, of shape (). model: as the engine runs it, perhaps wrapped."""

    def begin_epoch(self, epoch: int) -> None:
        """Do what is due before an epoch, of which the first is 1; most methods have nothing to do."""
        del epoch


@dataclass(frozen=True)
class Method(ABC):
    """A way to train, as a decision of plain values. uses: functions of a task that it calls where they are."""

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    defaults: ClassVar[Defaults]
    uses: ClassVar[tuple[str, ...]] = ()
    has_teacher: ClassVar[bool] = False

    @abstractmethod
    def objective(self, task: Task, model: nn.Module, teacher: nn.Module | None) -> Objective:
        """Return what is minimised. model: the one that learns, on its device, not wrapped; teacher: a model beside it.

        A method with ``has_teacher`` is given one.
        """
