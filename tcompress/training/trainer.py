"""Training of one compressed checkpoint: from what it starts from to the draft of the output."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.unchanged import Witness
from tcompress.errors import LimitError
from tcompress.training.curves import Curves
from tcompress.training.engine import Engine
from tcompress.training.factors import as_stored
from tcompress.training.learner import make_learner
from tcompress.training.loop import train
from tcompress.training.models import Models
from tcompress.training.objective import Method
from tcompress.training.options import TrainingOptions
from tcompress.training.outcome import Best, NothingBetterError, Outcome, Trained
from tcompress.training.rounds import Tell
from tcompress.training.starting import has_rounds, is_started
from tcompress.training.state import SavedState
from tcompress.training.watching import Watch
from tcompress.version import __version__
from tcompress.workflow.resaving import write_like
from tcompress.workflow.results import describe
from tcompress.workflow.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

_FREE = ("max_hours", "save_every", "device")  # options that two runs may differ in, and end alike


@dataclass(frozen=True)
class Trainer:
    """Trains compressed checkpoints, all for one output. witness: of the files that must not change meanwhile."""

    accelerator: Accelerator
    task: Task
    against: Checkpoint | None
    output: Output
    witness: Witness
    strip_prefix: str
    watch: Watch

    def train(
        self,
        method: Method,
        start: Checkpoint,
        options: TrainingOptions,
        tell: Tell,
        curves: Curves,
    ) -> Trained:
        """Train a checkpoint, and write the draft of the output with the best values. Raises as ``finetune``."""
        saved = SavedState(self.output.workspace, self.run_of(start, method, options))
        self.output.is_worth_keeping = lambda: saved.exists() or has_rounds(self.output)
        engine = Engine(self.accelerator, self.task, options, method.defaults, saved, tell, self.watch, curves)
        models = Models(start, self.task, self.strip_prefix, self.accelerator.device)
        learner = make_learner(models, engine, method, self.against)
        self.output.is_worth_keeping = lambda: saved.exists() or is_started(self.output)
        outcome = train(engine, learner.model, learner.objective)
        best = _writable(outcome, self.output, self.task)
        self.witness.require_unchanged()
        scores: Mapping[str, float] = best.scores
        if self.accelerator.is_main_process:
            with as_stored(learner.model):
                write_like(self.output, learner.model, start, strip_prefix=self.strip_prefix, against=self.against)
            scores = engine.evaluate_alone(models.written(self.output.draft))
        return Trained(
            rows=outcome.rows,
            best_epoch=best.epoch,
            steps=outcome.steps,
            seconds=outcome.seconds,
            problem=outcome.problem,
            dense=learner.dense,
            before=learner.before or outcome.rows[0].scores,
            after=scores,
            notes=(*learner.objective.notes, *_notes(outcome, best, saved, learner.kept, scores)),
        )

    def run_of(self, checkpoint: Checkpoint, method: Method, options: TrainingOptions) -> dict[str, Any]:
        """Return what two runs must have in common to end with the same bytes."""
        asked = {name: value for name, value in asdict(options).items() if name not in _FREE}
        return {
            "tcompress": __version__,
            "torch": torch.__version__,
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "source": describe(checkpoint).sha256,
            "against": None if self.against is None else describe(self.against).sha256,
            "task": [self.task.spec, hashlib.sha256(self.task.path.read_bytes()).hexdigest()],
            "method": [method.name, asdict(method)],
            "options": asked,
        }


def _writable(outcome: Outcome, output: Output, task: Task) -> Best:
    """Return the epoch that is written. Raises NumericalError and LimitError where there is none."""
    best, problem = outcome.best, outcome.problem
    if problem is not None and (best is None or best.epoch == 0):
        output.is_worth_keeping = lambda: False  # the same steps would lead there again
        raise NothingBetterError(problem, path=task.path)
    if best is None:
        why = f"ended at step {outcome.steps}, before the method had made what may be written"
        raise LimitError(f"{why}; give it more time, with more --max-hours it goes on from there", path=task.path)
    return best


def _notes(
    outcome: Outcome, best: Best, saved: SavedState, kept: Sequence[str], scores: Mapping[str, float]
) -> tuple[str, ...]:
    notes = [f"{name} stays as it is stored: it has no factorised form in this model" for name in kept]
    if saved.restarted:
        notes.append("what an unfinished run with other settings had left was thrown away")
    if outcome.resumed_at is not None:
        notes.append(f"went on from step {outcome.resumed_at} of a run that was stopped")
    if best.epoch == 0:
        notes.append("no epoch was better than the model before: its values are written as they were")
    name, known = best.score
    if scores.get(name) != known:
        notes.append(f"what was written has {name} {scores.get(name)}, and had {known} while it was trained")
    return tuple(notes)
