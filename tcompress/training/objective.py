"""What every method gives the engine: a loss to be made smaller, and what is to be done between epochs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tcompress.checkpoint.reader import Checkpoint
from tcompress.training.options import Defaults
from tcompress.training.schedule import cosine
from tcompress.workflow.plan import Plan
from tcompress.workflow.task import Task


class Objective(ABC):
    """What is minimised. Whatever changes from step to step lies in the model, or hangs on the step's number alone."""

    notes: Sequence[str] = ()  # what a user should know of this model, a line each

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss of a batch, of shape (). model: as the engine runs it, perhaps wrapped."""

    def begin_epoch(self, epoch: int, *, anew: bool) -> None:
        """Do what is due before an epoch, of which the first is 1; most methods have nothing to do.

        anew: whether its first step comes next. Else a stopped run goes on in the middle of it, with the model that
        this had changed already: only what the model does not hold is to be made again.
        """
        del epoch, anew

    def end_epoch(self, epoch: int) -> None:
        """Do what is due after the last step of an epoch, before the model is scored."""
        del epoch

    def begin_step(self, step: int, steps: int) -> None:
        """Do what is due before a step, of which the first is 0, of so many; most methods have nothing to do."""
        del step, steps

    def rate(self, step: int, steps: int) -> float:
        """Return the part of the highest rate of the default optimizer that a step learns with."""
        return cosine(step, steps)

    def may_be_written(self, epoch: int) -> bool:
        """Tell whether the model after an epoch, 0 before the first, is one that was asked for."""
        del epoch
        return True


@dataclass(frozen=True)
class Setup:
    """What a method makes its objective from.

    model: the one that learns, on its device, not wrapped. teacher: a model beside it, of a method that has one; else
    None. epochs: at most; None where steps alone were asked for, which ``by_epochs`` rules out. mean_loss: tells a
    model's loss on some of the batches it is to learn from, the same in every process.
    """

    task: Task
    model: nn.Module
    teacher: nn.Module | None
    epochs: int | None
    seed: int
    mean_loss: Callable[[nn.Module], float] | None = None


@dataclass(frozen=True)
class Method(ABC):
    """A way to train, as a decision of plain values.

    needs: functions that a task must have beside ``model`` and ``evaluate``. uses: those it calls where they are.
    has_teacher: learns from a model beside its own. starts_dense: begins with a dense checkpoint and a plan; else with
    a compressed checkpoint. takes_weights: learns from what the weights were fitted to; else only from shapes.
    by_epochs: has to know how many epochs there are.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    defaults: ClassVar[Defaults]
    needs: ClassVar[tuple[str, ...]] = ("train_batches", "loss")
    uses: ClassVar[tuple[str, ...]] = ()
    has_teacher: ClassVar[bool] = False
    starts_dense: ClassVar[bool] = False
    takes_weights: ClassVar[bool] = True
    by_epochs: ClassVar[bool] = False

    def own_plan(self, checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Plan | None:
        """Return the plan for a dense checkpoint where none is given; None of a method that has none of its own.

        include, exclude: globs of the layers that it is for. Raises UsageError where they match nothing.
        """
        del checkpoint, include, exclude
        return None

    def check_plan(self, plan: Plan) -> None:
        """Raise UsageError for a plan that does not serve, of a method with ``starts_dense``."""
        del plan

    def fitted(self, task: Task) -> Task:
        """Return the task as it serves this method. Raises UsageError for one that does not."""
        return task

    def prepare(self, setup: Setup, dense: nn.Module | None) -> None:
        """Change the loaded model into the one that learns; most methods have nothing to do.

        setup: its model has factorised layers that ``let_learn`` has made ready. dense: the same model with the dense
        weights, which do not learn, where a dense checkpoint is known; a method with ``starts_dense`` is always given
        one.
        """
        del setup, dense

    @abstractmethod
    def objective(self, setup: Setup) -> Objective:
        """Return what is minimised. Raises UsageError and TaskError for a model or a task that does not serve."""
