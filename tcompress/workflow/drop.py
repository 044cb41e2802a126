"""The smallest plan whose compressed model scores as well as is asked for: found by compressing and evaluating.

What each layer could be is known before; a budget of bytes is bisected, on a logarithmic scale, as if fewer bytes never
scored better. Each plan on the way is carried out as ``compress`` does it, in a temporary folder.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from tcompress.errors import LimitError, UsageError
from tcompress.workflow.allocation import smallest_cost
from tcompress.workflow.budgeting import Planned, choose
from tcompress.workflow.budgets import Budget, points_of
from tcompress.workflow.calibration import seeded
from tcompress.workflow.choices import Choices
from tcompress.workflow.compression import compress, run_of
from tcompress.workflow.evaluations import Evaluated, Evaluations, Scores, Search
from tcompress.workflow.loading import load_into, load_state_dict
from tcompress.workflow.plan import Plan
from tcompress.workflow.progress import Progress, Step, silent
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.results import describe
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import Task
from tcompress.workflow.tracing import NEEDS as TRACED

NEEDS = (*TRACED, "evaluate")  # functions that a task must have
MOST_EVALUATIONS = 8
_NEAR = 1.02  # budgets this close are not told apart
_SMALLEST = 1e-6  # part of the bytes, where a layer of zeros takes none


@dataclass
class Trials:
    """Evaluates plans of one checkpoint by one task. evaluations: those that are known from before.

    reconstruction: of the same task; each plan is fitted by it, from the dense model on.
    """

    choices: Choices
    reconstruction: Reconstruction
    task: Task
    settings: Settings = field(default_factory=Settings)
    strip_prefix: str = ""
    evaluations: Evaluations = field(default_factory=lambda: Evaluations(None))
    progress: Progress = silent

    def __post_init__(self) -> None:
        self._source = describe(self.choices.checkpoint)

    def dense(self) -> Scores:
        """Return the scores of the dense model."""
        return self._scores(None)[0]

    def of(self, plan: Plan) -> tuple[Scores, bool]:
        """Return the scores of the compressed model, and whether they were known. Raises as ``compress`` does."""
        return self._scores(plan)

    def _scores(self, plan: Plan | None) -> tuple[Scores, bool]:
        checkpoint = self.choices.checkpoint
        run = run_of(checkpoint, plan or Plan(()), self.settings, self._source, self.reconstruction)
        return self.evaluations.scores({**run, "dense": plan is None}, lambda: self._measured(plan))

    def _measured(self, plan: Plan | None) -> Scores:
        with seeded():
            model = self.task.model()
            if plan is None:
                load_state_dict(self.choices.checkpoint, model, strip_prefix=self.strip_prefix)
            else:
                model = self._compressed(plan, model)
            with torch.inference_mode():
                return self.task.evaluate(model.to(self.settings.device).eval())

    def _compressed(self, plan: Plan, model: nn.Module) -> nn.Module:
        checkpoint = self.choices.checkpoint
        self.reconstruction.restart()
        with tempfile.TemporaryDirectory(prefix="tcompress-") as folder:
            out = Path(folder) / ("compressed.safetensors" if checkpoint.folder is None else "compressed")
            compress(
                checkpoint,
                plan,
                out=out,
                settings=self.settings,
                reconstruction=self.reconstruction,
                progress=self.progress,
            )
            return load_into(model, out, strip_prefix=self.strip_prefix)


def plan_within_drop(trials: Trials, max_drop: float, *, most: int = MOST_EVALUATIONS) -> Planned:
    """Return the smallest plan, of at most ``most`` evaluated ones, that scores at most ``max_drop`` below dense.

    Raises LimitError, with the smallest drop there was, when none does; TaskError when the task's code fails.
    """
    started = time.perf_counter()
    if not (max_drop >= 0 and math.isfinite(max_drop)) or most < 1:
        raise UsageError("--max-drop is a number from 0 on, --max-evaluations one from 1 on")
    name, dense_score = next(iter(trials.dense().items()))
    choices, best = trials.choices, None
    low, high = _smallest_keep(choices), 1.0
    evaluated: list[Evaluated] = []
    while len(evaluated) < most and high > _NEAR * low:
        keep = math.sqrt(low * high)
        planned = choose(choices, Budget(keep=keep))
        trials.progress(Step(f"evaluating keep {keep:.4g}", len(evaluated) + 1, most, "", len(evaluated), most))
        scores, was_known = trials.of(planned.plan)
        score = _named(scores, name, trials.task)
        evaluated.append(Evaluated(keep, planned.stored_bytes, score, dense_score - score, was_known))
        if evaluated[-1].drop <= max_drop:
            best, high = planned, keep
        else:
            low = keep
    if best is None:
        raise _unmet(choices, max_drop, evaluated)
    return replace(
        best,
        budget={"max_drop": max_drop},
        notes=[*best.notes, *(_told(name, each) for each in evaluated)],
        seconds=choices.seconds + time.perf_counter() - started,
        search=Search(name, dense_score, evaluated),
    )


def _smallest_keep(choices: Choices) -> float:
    least = smallest_cost(points_of(choices, Budget(keep=1)))
    return max(least / choices.dense_bytes, _SMALLEST)


def _named(scores: Scores, name: str, task: Task) -> float:
    if name not in scores:
        raise UsageError(
            f"evaluate gives no {name} for the compressed model, as it does for the dense one", path=task.path
        )
    return scores[name]


def _told(name: str, each: Evaluated) -> str:
    known = ", known from before" if each.was_known else ""
    return f"--keep {each.keep:.4g}: {name} {each.score:.6g}, {each.drop:.4g} below dense{known}"


def _unmet(choices: Choices, max_drop: float, evaluated: Sequence[Evaluated]) -> LimitError:
    path = choices.checkpoint.path
    if not evaluated:
        return LimitError("no layer can be stored in fewer bytes", path=path)
    nearest = min(evaluated, key=lambda each: each.drop)
    return LimitError(
        f"none of {len(evaluated)} plans scores at most {max_drop:g} below the dense model; the smallest drop is "
        f"{nearest.drop:.4g}, with --keep {nearest.keep:.4g}; allow that, or more --max-evaluations",
        path=path,
    )
