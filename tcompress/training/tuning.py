"""finetune(): a compressed checkpoint and a task in, the same checkpoint with better values out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.unchanged import Witness
from tcompress.training.curves import Curves, check_tensorboard, curves_in
from tcompress.training.engine import make_accelerator
from tcompress.training.history import Row, history_in
from tcompress.training.iterating import Iterate
from tcompress.training.methods import METHODS
from tcompress.training.objective import Method
from tcompress.training.options import TrainingOptions
from tcompress.training.outcome import Round, Scored, Trained
from tcompress.training.round_files import RoundFiles
from tcompress.training.rounds import Course, Tell, check_rounds
from tcompress.training.starting import check_start, left_dense, opened_start
from tcompress.training.trainer import Trainer
from tcompress.training.watching import Watch, unwatched
from tcompress.workflow.plan import Plan
from tcompress.workflow.results import Stored, describe, measure
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

_NEEDS = ("model", "evaluate")  # functions that a task must have for finetune(), beside the method's own
USES = ("optimizer", "scheduler")  # and those that are used if there, beside the method's own


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
    CSV or JSON; none stays of a run that fails and cannot go on. tensorboard: a folder for TensorBoard's curves.

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
    if not method.takes_weights:  # what fits these better says nothing of factors that are drawn
        settings = replace(settings, joint_as_asked=True)
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
    trainer = Trainer(accelerator, task, against, output, Witness.of(files), strip_prefix, watch)
    history, tensorboard = (path if accelerator.is_main_process else None for path in (history, tensorboard))
    with (
        history_in(history, output.workspace) as write_rows,  # around the output, whose workspace is looked at last
        _owned(output, accelerator),
        curves_in(tensorboard) as curves,
    ):

        def tell(rows: Sequence[Row]) -> None:
            write_rows(rows)
            curves.rows(rows)

        job = _Job(trainer, checkpoint, plan, settings, method, options)
        trained, rounds, nbytes = (job.in_rounds if isinstance(method, Iterate) else job.at_once)(tell, curves)
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
class _Job:
    """What is to be trained, and how: all at once, or in rounds. Both write the output's draft."""

    trainer: Trainer
    checkpoint: Checkpoint
    plan: Plan | None
    settings: Settings
    method: Method
    options: TrainingOptions

    def at_once(self, tell: Tell, curves: Curves) -> tuple[Trained, tuple[Round, ...], int]:
        """Train once. Return that, no rounds, and the bytes of what it started from."""
        output, accelerator = self.trainer.output, self.trainer.accelerator
        with opened_start(output, self.checkpoint, self.plan, self.settings, accelerator) as start:
            trained = self.trainer.train(self.method, start, self.options, tell, curves)
            notes = (*left_dense(self.checkpoint, self.plan, start), *trained.notes)
            return replace(trained, notes=notes), (), describe(start).nbytes

    def in_rounds(self, tell: Tell, curves: Curves) -> tuple[Trained, tuple[Round, ...], int]:
        """Train round after round. Return all as one, each by itself, and the bytes of what the last started from."""
        assert isinstance(self.method, Iterate), "others have no rounds"  # noqa: S101
        assert self.plan is not None, "check_start was called"  # noqa: S101
        run = self.trainer.run_of(self.checkpoint, self.method, self.options)
        run |= {"plan": self.plan.to_json(), "store": str(self.settings.store)}
        course = Course(
            self.checkpoint,
            describe(self.checkpoint).nbytes,
            self.plan,
            self.settings,
            self.method,
            self.options,
            RoundFiles(self.trainer.output, run),
            self.trainer.accelerator,
        )
        trained, rounds = course.go(partial(self.trainer.train, self.method.trainer), tell, curves)
        return trained, rounds, rounds[-1].nbytes_before


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
