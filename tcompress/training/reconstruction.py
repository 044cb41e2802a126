"""reconstruct: layer by layer, or block by block, give what the dense model gives, behind what is compressed before.

No labels. For a unit p with parameters theta_p, compressed prefix S and dense model D this minimises, over the batches,

    || f_p(S(x); theta_p) - D_p(x) ||^2 / || D_p(x) ||^2

after J. Su, J. Li, B. Bhattacharjee, F. Huang, "Tensorized spectrum preserving compression for neural networks", 2018
(their sequential tuning, which they follow by tuning end to end). The error is relative so that all units weigh alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from tcompress.errors import TaskError, TcompressError, UsageError
from tcompress.training.batches import seed_all
from tcompress.training.coded import ThroughCodes, through_codes
from tcompress.training.comparing import KL, SQUARED, Comparison, Measure, answers_of
from tcompress.training.distillation import Call, calls_of
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults
from tcompress.training.schedule import cosine
from tcompress.training.units import LAYER, Unit, find_units, in_no_unit, whole
from tcompress.workflow.task import Task
from tcompress.workflow.tracing import as_call, on_device
from tcompress.workflow.user_code import failed

TOGETHER, SEQUENTIAL = "together", "sequential"
ORDERS = (TOGETHER, SEQUENTIAL)
TRAIN, CALIBRATION = "train_batches", "calibration_batches"
OUTPUTS = {"squared": SQUARED, "kl": KL}
SOURCES = {"auto": (TRAIN, CALIBRATION), "train": (TRAIN,), "calibration": (CALIBRATION,)}


@dataclass(frozen=True)
class Reconstruct(Method):
    """Match what the dense model's layers or blocks give.

    by: ``layer``, ``block``, or a glob of module names, see ``find_units``. order: ``together``, all units in each
    step, each behind what the others are by then; ``sequential``, one after another in the order of their calls, with
    as many steps each: what is before a unit is final, and no step computes what is behind it. end_to_end: the part of
    all steps, the last ones, in which the model as a whole learns to give the dense model's outputs. outputs: by which
    measure it does: ``squared``, that of the units, of everything that it gives; ``kl``, the divergence of logits that
    ``distill`` has by default. batches: ``train`` for train_batches, ``calibration`` for calibration_batches, which are
    inputs of the model; ``auto`` for the first of the two that the task has. through_codes: as of ``finetune``.
    """

    by: str = LAYER
    order: str = TOGETHER
    end_to_end: float = 0.5
    outputs: str = "squared"
    batches: str = "auto"
    through_codes: bool = True

    name: ClassVar[str] = "reconstruct"
    summary: ClassVar[str] = "what each layer or block of the dense model gives; no labels"
    reference: ClassVar[str] = "Su et al. 2018"
    defaults: ClassVar[Defaults] = Defaults(epochs=3, lr=1e-3)
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ("teacher", "loss", TRAIN, CALIBRATION)
    has_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.by:
            raise UsageError("by is layer, block or a glob of module names; got nothing")
        for name, known in (("order", ORDERS), ("outputs", OUTPUTS), ("batches", SOURCES)):
            if getattr(self, name) not in known:
                raise UsageError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
        if not 0 <= self.end_to_end <= 1:
            raise UsageError(f"end_to_end must be from 0 to 1, got {self.end_to_end:g}")

    def fitted(self, task: Task) -> Task:
        wanted = SOURCES[self.batches]
        source = next((each for each in wanted if task.has(each)), None)
        if source is None:
            what = f"has no function {' and none '.join(wanted)}"
            raise UsageError(f"{what}; write: def {wanted[-1]}() -> Iterable", path=task.path)
        return task.with_batches_of(source)

    def objective(self, setup: Setup) -> Objective:
        assert setup.teacher is not None, "it has one"  # noqa: S101
        codes = through_codes(setup.model, asked=self.through_codes)
        return Matching(self, setup.task, setup.model, setup.teacher, codes)


@dataclass(frozen=True)
class Phase:
    """Steps in which the same units learn. part: of all steps; first, last: the first of them, and the first after."""

    units: Sequence[Unit]
    measure: Measure
    part: float
    first: int = 0
    last: int = 0


class Matching(Objective):
    """The mean over units of their relative squared error.

    Both models are in evaluation mode: statistics of normalisations stay as they are, and nothing is dropped. What lies
    between units does not learn, and no gradient goes from one to another. codes: of the student's factors, through
    which it learns.
    """

    def __init__(
        self, method: Reconstruct, task: Task, student: nn.Module, teacher: nn.Module, codes: ThroughCodes | None
    ) -> None:
        self._codes = codes
        self._task, self._student, self._teacher = task, student, teacher
        self._asks_loss = task.batches == TRAIN and task.has("loss")
        units = find_units(student, teacher, method.by, self._called(), task.path)
        self.units = [unit.name for unit in units]
        left = [] if method.end_to_end > 0 else in_no_unit(student, units)
        self.notes = [f"{name} stays as it is stored: what computes with it is the model itself" for name in left]
        groups = [units] if method.order == TOGETHER else [[unit] for unit in units]
        phases = [Phase(group, SQUARED, (1 - method.end_to_end) / len(groups)) for group in groups]
        phases.append(Phase([whole(student, teacher)], OUTPUTS[method.outputs], method.end_to_end))
        self._phases = [phase for phase in phases if phase.part > 0]
        self._phase: Phase | None = None
        _average_gradients(student)

    def rate(self, step: int, steps: int) -> float:
        phase = self._phase_at(step, steps)
        return cosine(step - phase.first, phase.last - phase.first)

    def begin_step(self, step: int, steps: int) -> None:
        if self._codes is not None:
            self._codes.begin_step(step)
        self._phase = self._phase_at(step, steps)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        del model  # its wrapper exchanges the gradients of what the model returns, and these are of what lies within
        assert self._phase is not None, "begin_step was called"  # noqa: S101
        if self._student.training:
            self._student.eval()
        units, measure = self._phase.units, self._phase.measure
        with torch.no_grad(), answers_of(units, measure) as answers:
            calls = self._taught(batch)
        comparison = Comparison(units, answers, measure, self._task.path)
        with comparison.listening():
            for call in calls:
                self._run(self._student, call.arguments, call.named, "the model does not take the teacher's inputs")
        return comparison.error()

    def _called(self) -> list[nn.Module]:
        """Return the teacher's modules that the first batch calls, in the order of their first calls."""
        found: dict[nn.Module, None] = {}
        seed_all(0, 0)
        batch = next(self._task.train_batches(), None)
        if batch is None:
            raise TaskError(f"{self._task.batches} gives no batch", path=self._task.path)
        with ExitStack() as stack, torch.no_grad():
            for module in self._teacher.modules():
                handle = module.register_forward_pre_hook(lambda each, _: found.setdefault(each))
                stack.callback(handle.remove)
            self._taught(on_device(batch, next(self._student.parameters()).device))
        return list(found)

    def _taught(self, batch: Any) -> list[Call]:
        """Run the teacher on a batch; return how it was called."""
        with calls_of(self._teacher) as calls:
            if self._asks_loss:
                self._task.loss(self._teacher, batch)
            else:
                hint = "" if self._task.batches == CALIBRATION else ", its inputs where there is no loss(model, batch)"
                why = f"the model does not take what {self._task.batches} gives{hint}"
                self._run(self._teacher, *as_call(batch), why)
        if not calls:
            raise TaskError("loss does not call the model that it is given", path=self._task.path)
        return calls

    def _run(self, model: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any], why: str) -> None:
        try:
            model(*arguments, **named)
        except TcompressError:
            raise
        except Exception as error:
            raise failed(error, self._task.path, f"{why}: ") from error

    def _phase_at(self, step: int, steps: int) -> Phase:
        """Return the phase of a step, the first being 0. Raises UsageError where there are more phases than steps."""
        if self._phases[-1].last != steps:
            edges = [round(each * steps) for each in accumulate((each.part for each in self._phases), initial=0.0)]
            spans = zip(self._phases, pairwise(edges), strict=True)
            self._phases = [replace(phase, first=first, last=last) for phase, (first, last) in spans]
        if any(phase.first == phase.last for phase in self._phases):
            problem = f"{steps} step(s) are too few to train {len(self._phases)} parts one after another"
            raise UsageError(f"{problem}; give more --epochs", path=self._task.path)
        return next((phase for phase in self._phases if step < phase.last), self._phases[-1])


def _average_gradients(model: nn.Module) -> None:
    """Let several processes have the mean of their gradients."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return

    def average(parameter: Tensor) -> None:
        if parameter.grad is not None:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)  # type: ignore[no-untyped-call]
