"""finetune: the task's own loss, end to end, over factors, biases and normalisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults
from tcompress.workflow.task import Task


class TaskLoss(Objective):
    """The loss that the task says."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._task.loss(model, batch)


@dataclass(frozen=True)
class Finetune(Method):
    """Train on the task's loss."""

    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "the task's loss, end to end on the factors; zeros of sparse factors stay zero"
    reference: ClassVar[str] = "Han et al. 2015; Novikov et al. 2015"
    defaults: ClassVar[Defaults] = Defaults(epochs=3, lr=1e-3)

    def objective(self, setup: Setup) -> Objective:
        return TaskLoss(setup.task)
