"""finetune: the task's own loss, end to end, over factors, biases and normalisations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tcompress.training.coded import ThroughCodes, through_codes
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults
from tcompress.workflow.task import Task


class TaskLoss(Objective):
    """The loss that the task says. codes: of the model's factors, which it is to learn through."""

    def __init__(self, task: Task, codes: ThroughCodes | None = None) -> None:
        self._task, self._codes = task, codes

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self._task.loss(model, batch)

    def begin_step(self, step: int, steps: int) -> None:
        del steps
        if self._codes is not None:
            self._codes.begin_step(step)


@dataclass(frozen=True)
class Finetune(Method):
    """Train on the task's loss.

    through_codes: whether factors that are stored as int8, int4 or int3 are trained as these codes make them.
    """

    through_codes: bool = True

    name: ClassVar[str] = "finetune"
    summary: ClassVar[str] = "the task's loss, end to end on the factors; zeros of sparse factors stay zero"
    reference: ClassVar[str] = "Han et al. 2015; Novikov et al. 2015"
    defaults: ClassVar[Defaults] = Defaults(epochs=3, lr=1e-3)

    def objective(self, setup: Setup) -> Objective:
        return TaskLoss(setup.task, through_codes(setup.model, asked=self.through_codes))
