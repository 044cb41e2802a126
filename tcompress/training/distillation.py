"""distill: the task's loss, and the outputs of a teacher, which is the model that was compressed.

Equation 8 of the low-rank-plus-sparse paper: alpha * loss + (1 - alpha) * T^2 * KL(student / T || teacher / T).
Letters: C = classes, the last dimension of logits; T = temperature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.errors import TaskError, TcompressError, UsageError
from tcompress.training.coded import ThroughCodes, through_codes
from tcompress.training.losses import require_gradient
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults
from tcompress.workflow.task import Task
from tcompress.workflow.user_code import failed

DIRECTIONS = ("student-teacher", "teacher-student")
_WRITE = "write: def logits(model, batch) -> torch.Tensor"


@dataclass(frozen=True)
class Call:
    """One call of a model."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Distill(Method):
    """Train on the task's loss and a teacher's outputs.

    alpha: the part of the task's loss. temperature: what logits are divided by. kl_direction: ``student-teacher``, as
    the paper prints it, is KL(student || teacher); ``teacher-student`` the other way round, as Hinton et al. have it.
    through_codes: as of ``finetune``.
    """

    alpha: float = 0.9
    temperature: float = 3.0
    kl_direction: str = "student-teacher"
    through_codes: bool = True

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "the task's loss and the dense model's outputs"
    reference: ClassVar[str] = "Hawkins et al. 2021, equation 8; Hinton et al. 2015"
    defaults: ClassVar[Defaults] = Defaults(epochs=3, lr=1e-3)
    uses: ClassVar[tuple[str, ...]] = ("teacher", "logits")
    has_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha must be from 0 to 1, got {self.alpha:g}")
        if not 0 < self.temperature < float("inf"):
            raise UsageError(f"--temperature must be above 0, got {self.temperature:g}")
        if self.kl_direction not in DIRECTIONS:
            raise UsageError(f"--kl-direction: {self.kl_direction!r} is none of {', '.join(DIRECTIONS)}")

    def objective(self, setup: Setup) -> Objective:
        assert setup.teacher is not None, "it has one"  # noqa: S101
        codes = through_codes(setup.model, asked=self.through_codes)
        return Distillation(self, setup.task, setup.model, setup.teacher, codes)


class Distillation(Objective):
    """Equation 8. Logits are what the task's ``logits`` gives, else what ``loss`` gets from the model that it calls.

    Then the teacher is called with the very arguments that the student was: inputs that ``loss`` draws at random are
    the same for both.
    """

    def __init__(
        self, method: Distill, task: Task, student: nn.Module, teacher: nn.Module, codes: ThroughCodes | None = None
    ) -> None:
        self._method, self._task, self._student, self._teacher = method, task, student, teacher
        self._codes = codes

    def begin_step(self, step: int, steps: int) -> None:
        del steps
        if self._codes is not None:
            self._codes.begin_step(step)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        alpha = self._method.alpha
        with calls_of(self._student) as calls:
            own = self._task.loss(model, batch)
        if alpha > 0 and torch.is_grad_enabled():  # the teacher's part has a gradient, and would hide it
            require_gradient(own, self._task)
        if alpha == 1:
            return own
        if self._task.has("logits"):
            with torch.no_grad():
                taught = self._task.logits(self._teacher, batch)
            pairs = [(self._task.logits(model, batch), taught)]
        else:
            pairs = self._pairs(calls)
        return alpha * own + (1 - alpha) * torch.stack([self._divergence(*pair) for pair in pairs]).mean()

    def _pairs(self, calls: list[Call]) -> list[tuple[Tensor, Tensor]]:
        """Return the logits of student and teacher for every call of the student."""
        if not calls:
            raise TaskError(f"loss does not call the model that it is given; {_WRITE}", path=self._task.path)
        found = []
        for call in calls:
            with torch.no_grad():
                try:
                    answer = self._teacher(*call.arguments, **call.named)
                except TcompressError:
                    raise
                except Exception as error:
                    raise failed(error, self._task.path, "the teacher does not take the student's inputs: ") from error
            found.append((self._logits(call.output), self._logits(answer)))
        return found

    def _logits(self, output: Any) -> Tensor:
        found = logits_in(output)
        if found is None:
            problem = f"the model gives {type(output).__name__}, in which no logits are found; {_WRITE}"
            raise TaskError(problem, path=self._task.path)
        return found

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape != teacher.shape:
            shapes = f"{tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher"
            raise TaskError(f"logits have other shapes: {shapes}", path=self._task.path)
        return divergence(student, teacher, self._method.temperature, self._method.kl_direction)


def divergence(student: Tensor, teacher: Tensor, temperature: float, direction: str) -> Tensor:
    """Return T^2 KL of softened logits (..., C), the mean over all positions, in float32."""
    mine, its = (F.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
    first, second = (mine, its) if direction == "student-teacher" else (its, mine)
    return temperature**2 * (first.exp() * (first - second)).sum(dim=-1).mean()


def logits_in(output: Any) -> Tensor | None:
    """Return the logits of a model's output: itself, its ``logits``, or the first of several; None without any."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.is_floating_point() and output.ndim > 0 else None


@contextmanager
def calls_of(model: nn.Module) -> Iterator[list[Call]]:
    """Note the calls of a model while the context lasts."""
    calls: list[Call] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append(Call(arguments, named, output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
