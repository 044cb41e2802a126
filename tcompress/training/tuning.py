"""finetune(): a compressed checkpoint and a task in, the same checkpoint with better values out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.unchanged import Witness
from tcompress.errors import LimitError
from tcompress.training.curves import Curves, check_tensorboard, curves_in
from tcompress.training.engine import Engine, make_accelerator
from tcompress.training.factors import as_stored
from tcompress.training.history import Row, write_history
from tcompress.training.iterating import Iterate
from tcompress.training.learner import make_learner
from tcompress.training.methods import METHODS
from tcompress.training.models import Models
from tcompress.training.objective import Method
from tcompress.training.options import TrainingOptions
from tcompress.training.outcome import Best, NothingBetterError, Outcome, Round, Scored, Trained
from tcompress.training.round_files import RoundFiles
from tcompress.training.rounds import Course, check_rounds
from tcompress.training.starting import check_start, has_rounds, is_started, opened_start
from tcompress.training.state import SavedState
from tcompress.training.watching import Watch, unwatched
from tcompress.version import __version__
from tcompress.workflow.plan import Plan
from tcompress.workflow.resaving import write_like
from tcompress.workflow.results import Stored, describe, measure
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

_NEEDS = ("model", "evaluate")  # functions that a task must have for finetune(), beside the method's own
USES = ("optimizer", "scheduler")  # and those that are used if there, beside the method's own
_FREE = ("max_hours", "save_every", "device")  # options that two runs may differ in, and end alike


@dataclass(frozen=True)
class TuningResult:
    """One run of ``finetune``.

    method: its name and options. dense: None where no dense checkpoint was given. after: measured on what was written.
    best_epoch: 0 where no epoch was better than the model before. problem: why training ended before its time.
    is_main: whether this process is the one of several that writes and tells.
    """

    task: str
    method: Mapping[str, Any]
    dense: Scored | None
    before: Scored
    after: Scored
    output: Stored
    rows: tuple[Row, ...]
    best_epoch: int
    steps: int
    device: str
    processes: int
    is_main: bool
    precision: str
    problem: str | None
    notes: tuple[str, ...]
    seconds: float
    rounds: tuple[Round, ...] = ()


def finetune(
    checkpoint: Checkpoint,
    task: Task,
    method: Method | None = None,
    *,
    out: Path | str,
    plan: Plan | None = None,
    settings: Settings | None = None,
    against: Checkpoint | None = None,
    options: TrainingOptions | None = None,
    strip_prefix: str = "",
    history: Path | None = None,
    tensorboard: Path | None = None,
    force: bool = False,
    watch: Watch = unwatched,
) -> TuningResult:
    """Train the factors of a compressed checkpoint with the task's data, and write it again with the best values.

    task: loaded with ``needs_of(method)`` and ``uses_of(method)``. method: ``Finetune()`` without one. plan, settings:
    of a method with ``starts_dense``: the checkpoint is then a dense one, which is compressed as ``compress`` does it
    before anything is trained. against: the dense checkpoint; a method with a teacher learns from it, its scores are
    measured, and errors against it; with a plan it is the checkpoint itself. history: a file with a row for each epoch,
    CSV or JSON. tensorboard: a folder for curves that TensorBoard shows.

    Biases, normalisations and dense layers learn too. Factors learn in float32 and are stored in the type that they
    had; every score is one of the model as it would be stored, and what is written is the epoch with the best first
    score, higher being better: the model as it came, if none is better. Where a loss is not finite the best epoch
    before it is written, and ``problem`` says so. ``iterate`` writes the best epoch of its last round.

    A run that is stopped, or killed, leaves its state beside ``out``; the same call goes on from there and writes the
    same bytes. Raises UsageError, OutputError, LockedError and InputError before anything is trained where they can be
    known; TaskError when the task's code fails; SafetyError when the memory is not enough; NumericalError when a loss
    is not finite and no epoch was better than before; LimitError when training ended before there was anything that
    the method may write.
    """
    started = time.perf_counter()
    out, method, options = Path(out), method or METHODS["finetune"](), options or TrainingOptions()
    settings = settings or Settings()
    plan = method.own_plan(checkpoint) if plan is None else plan
    check_start(checkpoint, task, method, plan, against, options, out)
    check_tensorboard(tensorboard)
    if isinstance(method, Iterate):
        check_rounds(method, options)
    against, task = checkpoint if method.starts_dense else against, method.fitted(task)
    accelerator = make_accelerator(options.device)
    files = list(dict.fromkeys([*checkpoint.files, *(() if against is None else against.files)]))
    inputs = [*files, *filter(None, [checkpoint.folder])]
    output = Output(out, is_folder=checkpoint.folder is not None, force=force, inputs=inputs)
    output.keeps_after_errors = True
    trainer = _Trainer(accelerator, task, against, output, Witness.of(files), strip_prefix, watch)
    with (
        _owned(output, accelerator),
        curves_in(tensorboard if accelerator.is_main_process else None) as curves,
    ):

        def tell(rows: Sequence[Row]) -> None:
            if history is not None and accelerator.is_main_process:
                write_history(history, rows)
            curves.rows(rows)

        rounds: tuple[Round, ...] = ()
        if isinstance(method, Iterate):
            assert plan is not None, "check_start was called"  # noqa: S101
            run = {**trainer.run_of(checkpoint, method, options), "plan": plan.to_json(), "store": str(settings.store)}
            files_of_rounds, nbytes = RoundFiles(output, run), describe(checkpoint).nbytes
            course = Course(checkpoint, nbytes, plan, settings, method, options, files_of_rounds, accelerator)
            trained, rounds = course.go(partial(trainer.train, method.trainer), tell, curves)
            nbytes = rounds[-1].nbytes_before
        else:
            with opened_start(output, checkpoint, plan, settings, accelerator) as start:
                trained = trainer.train(method, start, options, tell, curves)
                nbytes = describe(start).nbytes
        if accelerator.is_main_process:
            output.commit()
        accelerator.wait_for_everyone()
    output_stored = measure(out, output.is_folder)
    return TuningResult(
        task=task.spec,
        method={"name": method.name, **asdict(method)},
        dense=trained.dense,
        before=Scored(checkpoint.path, nbytes, trained.before),
        after=Scored(out, output_stored.nbytes, trained.after),
        output=output_stored,
        rows=trained.rows,
        best_epoch=trained.best_epoch,
        steps=trained.steps,
        device=str(accelerator.device),
        processes=accelerator.num_processes,
        is_main=accelerator.is_main_process,
        precision=options.precision,
        problem=trained.problem,
        notes=trained.notes,
        seconds=time.perf_counter() - started,
        rounds=rounds,
    )


@dataclass(frozen=True)
class _Trainer:
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
        tell: Callable[[Sequence[Row]], None],
        curves: Curves,
    ) -> Trained:
        """Train a checkpoint, and write the draft of the output with the best values. Raises as ``finetune``."""
        saved = SavedState(self.output.workspace, self.run_of(start, method, options))
        self.output.is_worth_keeping = lambda: saved.exists() or has_rounds(self.output)
        engine = Engine(self.accelerator, self.task, options, method.defaults, saved, tell, self.watch, curves)
        models = Models(start, self.task, self.strip_prefix, self.accelerator.device)
        learner = make_learner(models, engine, method, self.against)
        self.output.is_worth_keeping = lambda: saved.exists() or is_started(self.output)
        outcome = engine.train(learner.model, learner.objective)
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


def needs_of(method: Method) -> tuple[str, ...]:
    """Return the functions that a task must have."""
    return (*_NEEDS, *method.needs)


def uses_of(method: Method) -> tuple[str, ...]:
    """Return the functions of a task that are used where they are there."""
    return (*USES, *method.uses)


@contextmanager
def _owned(output: Output, accelerator: Accelerator) -> Iterator[None]:
    """Hold the output in the main process; the others begin when it does."""
    if accelerator.is_main_process:
        with output:
            accelerator.wait_for_everyone()
            yield
    else:
        accelerator.wait_for_everyone()
        yield


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
