"""What a run trains: the model that learns with its objective, and what is known of the models beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tcompress.checkpoint.reader import Checkpoint
from tcompress.training.engine import Engine
from tcompress.training.models import Models
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.outcome import Scored
from tcompress.workflow.results import describe


@dataclass(frozen=True)
class Learner:
    """The model that learns, and what is minimised.

    kept: tensors that stay as they are stored. dense: what the dense model scores, None where there is none. before:
    the scores of the compressed model as it came, None where they are those of the model that learns.
    """

    model: nn.Module
    objective: Objective
    kept: Sequence[str]
    dense: Scored | None
    before: Mapping[str, float] | None


def make_learner(models: Models, engine: Engine, method: Method, against: Checkpoint | None) -> Learner:
    """Load the models of a run, and prepare the one that learns. Raises as ``load_into``, and as the method does."""
    dense = None if against is None else models.dense(against)
    model, kept = models.learning()
    before = engine.evaluate(model) if method.starts_dense else None
    scored = None
    if against is not None and dense is not None:
        scored = Scored(against.path, describe(against).nbytes, engine.evaluate(dense))
    teacher = _teacher(models, method, dense)
    setup = Setup(models.task, model, teacher, engine.epochs, engine.options.seed, engine.mean_loss)
    method.prepare(setup, dense)
    return Learner(model, method.objective(setup), kept, scored, before)


def _teacher(models: Models, method: Method, dense: nn.Module | None) -> nn.Module | None:
    """Return the method's teacher, if it has one: the task's, or the dense model."""
    if method.has_teacher and models.task.has("teacher"):
        return models.task.teacher().to(models.device).eval().requires_grad_(False)
    return dense if method.has_teacher else None
