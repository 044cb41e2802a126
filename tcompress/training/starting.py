"""What a run starts from: a compressed checkpoint, or a dense one that is compressed first, by a plan."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX, open_checkpoint
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import UsageError
from tcompress.training.objective import Method
from tcompress.training.options import TrainingOptions
from tcompress.workflow.compression import compress, run_of
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan
from tcompress.workflow.results import describe
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

_STEM = "start"
ROUNDS = "rounds-"  # what the name of a folder begins with in which rounds are kept
RESULT = "result"  # of a round


def check_start(
    checkpoint: Checkpoint,
    task: Task,
    method: Method,
    plan: Plan | None,
    against: Checkpoint | None,
    options: TrainingOptions,
    out: Path,
) -> None:
    """Raise UsageError for what cannot be trained or written, before anything is loaded."""
    if method.by_epochs and options.epochs is None and options.steps is not None:
        raise UsageError(
            f"--method {method.name} goes by epochs; say --epochs, of which --steps may end the last early"
        )
    if method.starts_dense:
        _check_dense(checkpoint, method, plan, against)
    elif not is_compressed(checkpoint):
        raise UsageError("is not a compressed checkpoint; make one with `tcompress compress`", path=checkpoint.path)
    elif plan is not None:
        problem = f"--method {method.name} trains what is compressed already; leave out the plan"
        raise UsageError(problem, path=checkpoint.path)
    if against is not None and is_compressed(against):
        raise UsageError("is compressed itself; give the checkpoint it was made from", path=against.path)
    if method.has_teacher and not method.starts_dense and against is None and not task.has("teacher"):
        way_out = "give the dense checkpoint with --teacher, or write: def teacher() -> torch.nn.Module"
        raise UsageError(f"has no teacher for {method.name}; {way_out}", path=task.path)
    if checkpoint.folder is None and out.suffix != SAFETENSORS_SUFFIX:
        way_out = f"end the name with {SAFETENSORS_SUFFIX}"
        raise UsageError(f"compressed checkpoints are safetensors files; {way_out}", path=out)


def _check_dense(checkpoint: Checkpoint, method: Method, plan: Plan | None, against: Checkpoint | None) -> None:
    if is_compressed(checkpoint):
        problem = f"is compressed already; --method {method.name} starts from the dense checkpoint, with a plan"
        raise UsageError(problem, path=checkpoint.path)
    if plan is None:
        raise UsageError(f"--method {method.name} needs a plan: give --format or --plan", path=checkpoint.path)
    if against is not None and against is not checkpoint:
        raise UsageError("is the dense checkpoint itself; leave out --against and --teacher", path=checkpoint.path)
    method.check_plan(plan)


@contextmanager
def opened_start(
    output: Output, checkpoint: Checkpoint, plan: Plan | None, settings: Settings, accelerator: Accelerator
) -> Iterator[Checkpoint]:
    """Give what learns: the checkpoint itself, or with a plan what the plan makes of it, in the output's workspace.

    What a run of another kind has left there is taken away; what one of the same kind has finished is taken as it is.
    The main process compresses, the others wait. Raises as ``compress``.
    """
    if plan is None:
        yield checkpoint
        return
    run = run_of(checkpoint, plan, settings, describe(checkpoint), None)
    name = f"{_STEM}-{hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:16]}"
    path = output.workspace / (name if output.is_folder else name + SAFETENSORS_SUFFIX)
    if accelerator.is_main_process:
        output.is_worth_keeping = lambda: is_started(output)
        _sweep(output, name)
        if not path.exists():
            compress(checkpoint, plan, out=path, settings=settings)
    accelerator.wait_for_everyone()
    with open_checkpoint(path) as start:
        yield start


def left_dense(checkpoint: Checkpoint, plan: Plan | None, start: Checkpoint) -> list[str]:
    """Say which layers the plan speaks of and what it made has dense: they learn, and take the bytes they had."""
    compressed = view(start).manifest.layers
    rules = [] if plan is None else [(layer.name, plan.rule_for(layer.name)) for layer in find_layers(checkpoint)]
    return [
        f"{name} stays dense: {rule.format} does not make it smaller"
        for name, rule in rules
        if rule is not None and rule.format is not None and name not in compressed
    ]


def has_rounds(output: Output) -> bool:
    """Tell whether a round is over."""
    return any(output.workspace.glob(f"{ROUNDS}*/{RESULT}-*"))


def is_started(output: Output) -> bool:
    """Tell whether a checkpoint to start from was made, or begun, or a round."""
    return any(output.workspace.glob(f"*{_STEM}-*")) or any(output.workspace.glob(f"{ROUNDS}*/*"))


def _sweep(output: Output, name: str) -> None:
    """Take away what runs of another kind have left, and links, by which a stranger could choose what is read."""
    for other in output.workspace.glob(f"*{_STEM}-*"):
        if other.is_symlink() or (name not in other.name and other.is_file()):
            other.unlink()
        elif name not in other.name:
            shutil.rmtree(other)
