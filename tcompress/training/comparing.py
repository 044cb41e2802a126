"""What units of two models give, one beside the other: noted in the teacher, compared in the student as it runs.

Hooks alone: modules that are called several times, share inputs or are added to a shortcut need no care.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from tcompress.errors import TaskError
from tcompress.training.distillation import Distill, divergence, logits_in
from tcompress.training.units import Unit
from tcompress.workflow.samples import tensors_in

Answer = list[Tensor]  # what one call of a module gives, as far as it is compared


@dataclass(frozen=True)
class Measure:
    """How two outputs are compared. picked: the tensors of an output; distance: of two, as given and as in the teacher.

    wanted: what is picked, for messages.
    """

    picked: Callable[[Any], list[Tensor]]
    distance: Callable[[Tensor, Tensor], Tensor]
    wanted: str


class Complete(BaseException):  # no Exception: the model's code is not to catch it
    """All answers are compared: nothing that the model would still compute is needed."""


@contextmanager
def answers_of(units: Sequence[Unit], measure: Measure) -> Iterator[list[list[Answer]]]:
    """Note what the teachers of each unit give, call by call, while the context lasts."""
    found: list[list[Answer]] = [[] for _ in units]

    def note(at: int, _: nn.Module, __: Any, output: Any) -> None:
        found[at].append([tensor.clone() for tensor in measure.picked(output)])  # others may change it in place

    with _hooked() as hook:
        for at, unit in enumerate(units):
            for teacher in unit.teachers:
                hook(teacher.register_forward_hook(partial(note, at)))
        yield found


class Comparison:
    """One run of the student, without gradients but within units, none of which reaches into another."""

    def __init__(
        self, units: Sequence[Unit], answers: Sequence[Sequence[Answer]], measure: Measure, path: Path
    ) -> None:
        self._units, self._answers, self._measure, self._path = units, answers, measure, path
        self._errors: list[list[Tensor]] = [[] for _ in units]

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Compare the calls of all units while the context lasts; ends it where there are no more to come."""
        with _hooked() as hook, torch.no_grad():
            for at, unit in enumerate(self._units):
                hook(unit.module.register_forward_pre_hook(_enter))
                hook(unit.module.register_forward_hook(partial(self._compare, at)))
            try:
                yield
            except Complete:
                return

    def error(self) -> Tensor:
        """Return the mean over the units that were called of the distances of their outputs, of shape ()."""
        for unit, answers, errors in zip(self._units, self._answers, self._errors, strict=True):
            if len(errors) < len(answers):
                raise self._unlike(unit, f"is called {len(errors)} time(s), and in the teacher {len(answers)}")
        means = [torch.stack(errors).mean() for errors in self._errors if errors]
        if not means:
            problem = f"{self._units[0].name} is not called for this batch, and nothing else learns in this step"
            raise TaskError(f"{problem}; choose larger blocks with by=, or larger batches", path=self._path)
        return torch.stack(means).mean()

    def _compare(self, at: int, _: nn.Module, __: Any, output: Any) -> Any:
        unit, answers, errors = self._units[at], self._answers[at], self._errors[at]
        if len(errors) == len(answers):
            raise self._unlike(unit, f"is called more often than in the teacher, {len(answers)} time(s)")
        answer = answers[len(errors)]
        given = self._measure.picked(output)
        if not given:
            raise self._unlike(unit, f"gives {type(output).__name__}, in which no {self._measure.wanted} are found")
        if [each.shape for each in given] != [each.shape for each in answer]:
            raise self._unlike(unit, f"gives {_sizes(given)}, and in the teacher {_sizes(answer)}")
        distances = [self._measure.distance(*pair) for pair in zip(given, answer, strict=True)]
        errors.append(torch.stack(distances).mean())
        torch.set_grad_enabled(False)
        if all(len(done) == len(all_) for done, all_ in zip(self._errors, self._answers, strict=True)):
            raise Complete
        # A copy, for what comes may change it in place, and this unit's gradients need it as it is.
        return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), output)

    def _unlike(self, unit: Unit, problem: str) -> TaskError:
        way_out = "choose other blocks with by=" if unit.name else "end_to_end=0 leaves out what it gives"
        return TaskError(f"{unit.name or 'the model'} {problem}; {way_out}", path=self._path)


def _enter(_: nn.Module, __: Any) -> None:
    torch.set_grad_enabled(True)


def relative_error(given: Tensor, answer: Tensor) -> Tensor:
    """Return the squared distance over the squared norm of ``answer``, in float32; over 1 where that is zero."""
    norm = answer.float().square().sum()
    return (given.float() - answer.float()).square().sum() / torch.where(norm > 0, norm, 1.0)


def _floating(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _logits(output: Any) -> list[Tensor]:
    found = logits_in(output)
    return [] if found is None else [found]


SQUARED = Measure(_floating, relative_error, "floating tensors")
KL = Measure(_logits, partial(divergence, temperature=Distill.temperature, direction=Distill.kl_direction), "logits")


def _sizes(tensors: Sequence[Tensor]) -> str:
    return " and ".join("x".join(map(str, each.shape)) or "one value" for each in tensors) or "nothing like it"


@contextmanager
def _hooked() -> Iterator[Callable[[RemovableHandle], object]]:
    """Take hooks, and remove them in the end."""
    with ExitStack() as stack:
        yield lambda handle: stack.callback(handle.remove)
