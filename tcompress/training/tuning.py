"""finetune(): a compressed checkpoint and a task in, the same checkpoint with better values out."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX, open_checkpoint
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.unchanged import Witness
from tcompress.errors import NumericalError, UsageError
from tcompress.runtime.install import collect
from tcompress.training.engine import Engine, make_accelerator
from tcompress.training.factors import as_stored, let_learn
from tcompress.training.history import Row, write_history
from tcompress.training.methods import METHODS
from tcompress.training.objective import Method
from tcompress.training.options import TrainingOptions
from tcompress.training.outcome import Outcome
from tcompress.training.state import SavedState
from tcompress.training.watching import Watch, unwatched
from tcompress.version import __version__
from tcompress.workflow.loading import load_into, load_state_dict
from tcompress.workflow.resaving import kept_dense, write_like
from tcompress.workflow.results import Stored, describe, measure
from tcompress.workflow.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

NEEDS = ("model", "train_batches", "loss", "evaluate")  # functions that a task must have for finetune()
USES = ("optimizer", "scheduler")  # and those that are used if there, beside the method's own
_FREE = ("max_hours", "save_every", "device")  # options that two runs may differ in, and end alike


@dataclass(frozen=True)
class Scored:
    """A model with its bytes on disk and its scores."""

    path: Path
    nbytes: int
    scores: Mapping[str, float]


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


@dataclass(frozen=True)
class _Models:
    """The checkpoints of a run, and how they become models."""

    checkpoint: Checkpoint
    task: Task
    strip_prefix: str
    device: torch.device

    def learning(self) -> tuple[nn.Module, list[str]]:
        """Return the model that learns, and what it must leave as it is."""
        made = self.task.model()
        frozen = {name for name, each in made.named_parameters(remove_duplicate=False) if not each.requires_grad}
        model = self._loaded(made, self.checkpoint)
        kept = kept_dense(model, self.checkpoint, strip_prefix=self.strip_prefix)
        for name in kept:
            model.get_parameter(name).requires_grad_(False)
        let_learn(model, frozen)
        return _as_float32(model).to(self.device), kept

    def dense(self, checkpoint: Checkpoint) -> nn.Module:
        """Return the model with a dense checkpoint's weights, which do not learn."""
        model = self.task.model()
        load_state_dict(checkpoint, model, strip_prefix=self.strip_prefix)
        return _as_float32(model).to(self.device).eval().requires_grad_(False)

    def written(self, path: Path) -> nn.Module:
        """Return the model as it will be loaded from what was written."""
        with open_checkpoint(path) as checkpoint:
            model = self._loaded(self.task.model(), checkpoint)
        return _as_float32(model).to(self.device).eval()

    def _loaded(self, model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is loaded dense: ")  # the result's notes say it
            return load_into(model, checkpoint, strip_prefix=self.strip_prefix)


def finetune(
    checkpoint: Checkpoint,
    task: Task,
    method: Method | None = None,
    *,
    out: Path | str,
    against: Checkpoint | None = None,
    options: TrainingOptions | None = None,
    strip_prefix: str = "",
    history: Path | None = None,
    force: bool = False,
    watch: Watch = unwatched,
) -> TuningResult:
    """Train the factors of a compressed checkpoint with the task's data, and write it again with the best values.

    task: loaded with ``NEEDS``, and ``uses_of(method)``. method: ``Finetune()`` without one. against: the dense
    checkpoint; ``Distill`` learns from it, its scores are measured, and errors against it. history: a file with a row
    for each epoch, CSV or JSON.

    Biases, normalisations and dense layers learn too. Factors learn in float32 and are stored in the type that they
    had; every score is one of the model as it would be stored, and what is written is the epoch with the best first
    score, higher being better: the model as it came, if none is better. Where a loss is not finite the best epoch
    before it is written, and ``problem`` says so.

    A run that is stopped, or killed, leaves its state beside ``out``; the same call goes on from there and writes the
    same bytes. Raises UsageError, OutputError, LockedError and InputError before anything is trained where they can be
    known; TaskError when the task's code fails; SafetyError when the memory is not enough; NumericalError when a loss
    is not finite and no epoch was better than before.
    """
    started = time.perf_counter()
    out, method, options = Path(out), method or METHODS["finetune"](), options or TrainingOptions()
    _check(checkpoint, task, method, against, out)
    accelerator = make_accelerator(options.device)
    models = _Models(checkpoint, task, strip_prefix, accelerator.device)
    files = [*checkpoint.files, *(() if against is None else against.files)]
    inputs = [*files, *filter(None, [checkpoint.folder])]
    output = Output(out, is_folder=checkpoint.folder is not None, force=force, inputs=inputs)
    output.keeps_after_errors = True
    witness = Witness.of(files)
    with _owned(output, accelerator.is_main_process, accelerator.wait_for_everyone):
        run = _run_of(checkpoint, task, method, against, options, accelerator)
        saved = SavedState(output.workspace, run)
        output.is_worth_keeping = saved.exists

        def tell(rows: Sequence[Row]) -> None:
            if history is not None and accelerator.is_main_process:
                write_history(history, rows)

        engine = Engine(accelerator, task, options, method.defaults, saved, tell, watch)
        teacher, dense = _teacher(models, engine, method, against)
        model, kept = models.learning()
        outcome = engine.train(model, method.objective(task, model, teacher))
        if outcome.problem is not None and outcome.best.epoch == 0:
            output.is_worth_keeping = lambda: False  # the same steps would lead there again
            raise NumericalError(f"{outcome.problem}; nothing was written, no epoch was better", path=task.path)
        witness.require_unchanged()
        scores: Mapping[str, float] = outcome.best.scores
        if accelerator.is_main_process:
            with as_stored(model):
                write_like(output, model, checkpoint, strip_prefix=strip_prefix, against=against)
            del model
            scores = engine.evaluate_alone(models.written(output.draft))
            output.commit()
        accelerator.wait_for_everyone()
    output_stored = measure(out, output.is_folder)
    return TuningResult(
        task=task.spec,
        method={"name": method.name, **asdict(method)},
        dense=dense,
        before=Scored(checkpoint.path, describe(checkpoint).nbytes, outcome.rows[0].scores),
        after=Scored(out, output_stored.nbytes, scores),
        output=output_stored,
        rows=outcome.rows,
        best_epoch=outcome.best.epoch,
        steps=outcome.steps,
        device=str(accelerator.device),
        processes=accelerator.num_processes,
        is_main=accelerator.is_main_process,
        precision=options.precision,
        problem=outcome.problem,
        notes=_notes(outcome, saved, kept, scores),
        seconds=time.perf_counter() - started,
    )


def uses_of(method: Method) -> tuple[str, ...]:
    """Return the functions of a task that are used where they are there."""
    return (*USES, *method.uses)


def _check(checkpoint: Checkpoint, task: Task, method: Method, against: Checkpoint | None, out: Path) -> None:
    """Raise UsageError for what cannot be trained or written, before anything is loaded."""
    if not is_compressed(checkpoint):
        raise UsageError("is not a compressed checkpoint; make one with `tcompress compress`", path=checkpoint.path)
    if against is not None and is_compressed(against):
        raise UsageError("is compressed itself; give the checkpoint it was made from", path=against.path)
    if method.has_teacher and against is None and not task.has("teacher"):
        way_out = "give the dense checkpoint with --teacher, or write: def teacher() -> torch.nn.Module"
        raise UsageError(f"has no teacher for {method.name}; {way_out}", path=task.path)
    if checkpoint.folder is None and out.suffix != SAFETENSORS_SUFFIX:
        way_out = f"end the name with {SAFETENSORS_SUFFIX}"
        raise UsageError(f"compressed checkpoints are safetensors files; {way_out}", path=out)


@contextmanager
def _owned(output: Output, is_main: bool, wait: Callable[[], object]) -> Iterator[None]:
    """Hold the output in the main process; the others begin when it does."""
    if is_main:
        with output:
            wait()
            yield
    else:
        wait()
        yield


def _run_of(
    checkpoint: Checkpoint,
    task: Task,
    method: Method,
    against: Checkpoint | None,
    options: TrainingOptions,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Return what two runs must have in common to end with the same bytes."""
    asked = {name: value for name, value in asdict(options).items() if name not in _FREE}
    return {
        "tcompress": __version__,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": accelerator.num_processes,
        "device": str(accelerator.device),
        "source": describe(checkpoint).sha256,
        "against": None if against is None else describe(against).sha256,
        "task": [task.spec, hashlib.sha256(task.path.read_bytes()).hexdigest()],
        "method": [method.name, asdict(method)],
        "options": asked,
    }


def _teacher(
    models: _Models, engine: Engine, method: Method, against: Checkpoint | None
) -> tuple[nn.Module | None, Scored | None]:
    """Return the method's teacher, if it has one, and what the dense model scores, if there is one."""
    task = models.task
    model = None if against is None else models.dense(against)
    dense = None
    if against is not None and model is not None:
        dense = Scored(against.path, describe(against).nbytes, engine.evaluate(model))
    if not method.has_teacher:
        return None, dense
    if task.has("teacher"):
        model = task.teacher().to(models.device).eval().requires_grad_(False)
    return model, dense


def _as_float32(model: nn.Module) -> nn.Module:
    """Return a model of short floating numbers in float32: a step is often smaller than what they can tell apart."""
    types = {each.dtype for each in model.parameters()} | {each.like.dtype for each in collect(model).values()}
    return model.float() if types & {torch.bfloat16, torch.float16} else model


def _notes(outcome: Outcome, saved: SavedState, kept: Sequence[str], scores: Mapping[str, float]) -> tuple[str, ...]:
    notes = [f"{name} stays as it is stored: it has no factorised form in this model" for name in kept]
    if saved.restarted:
        notes.append("what an unfinished run with other settings had left was thrown away")
    if outcome.resumed_at is not None:
        notes.append(f"went on from step {outcome.resumed_at} of a run that was stopped")
    if outcome.best.epoch == 0:
        notes.append("no epoch was better than the model before: its values are written as they were")
    name, best = outcome.best.score
    if scores.get(name) != best:
        notes.append(f"what was written has {name} {scores.get(name)}, and had {best} while it was trained")
    return tuple(notes)
