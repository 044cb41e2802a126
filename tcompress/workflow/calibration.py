"""calibrate(): what the layers of a dense checkpoint meet on a task's data, and how much each output channel matters.

Two passes over the model as the task builds it: one forward for the moments of each layer's input, one with gradients
for the sensitivities. Letters: n = inputs of a weight's matrix.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.memory import available_memory
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import Statistics, write_draft
from tcompress.errors import InputError, UsageError
from tcompress.linalg.second_moment import LARGEST_FULL
from tcompress.workflow.moments import Inputs, moment_bytes
from tcompress.workflow.progress import Progress, Step, silent
from tcompress.workflow.results import Stored, describe, measure
from tcompress.workflow.sensitivity import sensitivities
from tcompress.workflow.task import Task
from tcompress.workflow.tracing import Traced, Use, calibration_inputs, load_traced

NEEDS = ("model", "calibration_batches")  # functions that a task must have for calibrate(), and those used if there
USES = ("loss", "train_batches")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Calibration:
    """One run of ``calibrate_to``."""

    statistics: Statistics
    source: Stored
    output: Stored
    task: str
    seconds: float


def calibrate_to(
    checkpoint: Checkpoint,
    task: Task,
    *,
    out: Path | str,
    force: bool = False,
    strip_prefix: str = "",
    device: torch.device | None = None,
    largest_full: int = LARGEST_FULL,
    memory_bytes: int | None = None,
    progress: Progress = silent,
) -> Calibration:
    """Calibrate and write the file of statistics; that it can be written is looked at first.

    Raises as ``calibrate`` and ``write_statistics``, and UsageError for a name without the suffix of safetensors.
    """
    started, out = time.perf_counter(), Path(out)
    if out.suffix != SAFETENSORS_SUFFIX:
        raise UsageError(f"statistics are a safetensors file; end the name with {SAFETENSORS_SUFFIX}", path=out)
    options: dict[str, Any] = {"strip_prefix": strip_prefix, "device": device, "progress": progress}
    with Output(out, is_folder=False, force=force, inputs=[*checkpoint.files, task.path]) as output:
        source = describe(checkpoint)
        found = _calibrated(
            checkpoint, task, source.sha256, largest_full=largest_full, memory_bytes=memory_bytes, **options
        )
        write_draft(found, output.draft)
        output.commit()
    return Calibration(found, source, measure(out, is_folder=False), task.spec, time.perf_counter() - started)


def calibrate(
    checkpoint: Checkpoint,
    task: Task,
    *,
    strip_prefix: str = "",
    device: torch.device | None = None,
    largest_full: int = LARGEST_FULL,
    memory_bytes: int | None = None,
    progress: Progress = silent,
) -> Statistics:
    """Return what the layers meet on ``calibration_batches``, and their sensitivity on ``train_batches`` if any.

    task: loaded with ``NEEDS`` and ``USES``. strip_prefix: what the checkpoint's names have in front of the model's.
    largest_full: inputs of a layer above which the diagonal of its moment is kept alone. memory_bytes: for all moments;
    the largest beyond it are summed in temporary files; None takes half of what the machine has. The random generators
    of Python, NumPy and torch begin at the same point each time and are as before in the end.

    Raises UsageError for a compressed checkpoint, InputError when weights and model do not fit, TaskError when the
    task's code fails or a batch does not fit the model, NumericalError for NaN or Inf in a layer's input or gradient.
    """
    return _calibrated(
        checkpoint,
        task,
        describe(checkpoint).sha256,
        strip_prefix=strip_prefix,
        device=device,
        largest_full=largest_full,
        memory_bytes=memory_bytes,
        progress=progress,
    )


def require_source(statistics: Statistics, checkpoint: Checkpoint) -> None:
    """Raise InputError, which names their file, unless the statistics were measured on this checkpoint."""
    if statistics.source != describe(checkpoint).sha256:
        raise InputError(
            f"holds statistics of another checkpoint than {checkpoint.path}; make its own with `tcompress calibrate`",
            path=statistics.path,
        )


def _calibrated(
    checkpoint: Checkpoint,
    task: Task,
    sha256: str,
    *,
    strip_prefix: str,
    device: torch.device | None,
    largest_full: int,
    memory_bytes: int | None,
    progress: Progress,
) -> Statistics:
    if is_compressed(checkpoint):
        raise UsageError("is compressed; calibrate the checkpoint it was made from", path=checkpoint.path)
    with seeded():
        batches = calibration_inputs(task)
        traced = load_traced(checkpoint, task, batches, strip_prefix=strip_prefix, device=device or _CPU)
        uses, notes = _by_layer(traced)
        told = _Told(uses, progress)
        spilled = _spilled(uses, largest_full, available_memory()[0] // 2 if memory_bytes is None else memory_bytes)
        # A mapped file without a name stays readable for as long as its tensor lives.
        with tempfile.TemporaryDirectory(prefix="tcompress-") as folder:
            inputs = Inputs(uses, checkpoint, largest_full, {name: Path(folder) for name in spilled})
            inputs.measure(traced, batches, told.of("moments", len(batches)))
        starting = told.of("sensitivities", len(batches))
        found = sensitivities(traced, task, batches, uses, checkpoint=checkpoint, starting=starting)
        told.finish()
    return Statistics(
        source=sha256,
        sensitivity_of=found.of,
        batches=len(batches),
        layers={name: inputs.statistics(name, sensitivity) for name, sensitivity in found.layers.items()},
        untraced=traced.untraced,
        spilled=tuple(spilled),
        notes=(*notes, *found.notes),
    )


def _by_layer(traced: Traced) -> tuple[dict[str, list[Use]], list[str]]:
    """Return the uses of each layer that are looked at, and what is to be said of the others."""
    uses: dict[str, list[Use]] = {}
    for use in traced.uses:
        uses.setdefault(use.layer.name, []).append(use)
    notes = []
    for name, all_ in uses.items():
        tables = [use for use in all_ if isinstance(use.module, nn.Embedding)]
        if tables and len(tables) < len(all_):
            uses[name] = tables
            notes.append(f"{name} is an embedding and a linear layer as well; only the embedding was looked at")
    return uses, notes


def _spilled(uses: Mapping[str, Sequence[Use]], largest_full: int, memory_bytes: int) -> list[str]:
    """Return the layers whose moments are summed in files: the largest, until the others fit into memory."""
    sizes = {name: moment_bytes(all_[0], largest_full) for name, all_ in uses.items()}
    total, spilled = sum(sizes.values()), []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if total <= memory_bytes:
            break
        total -= sizes[name]
        spilled.append(name)
    return spilled


class _Told:
    """Tells progress which layer of which batch is called; the bar is full when all batches are through."""

    def __init__(self, uses: Mapping[str, Sequence[Use]], progress: Progress) -> None:
        self._sizes = {name: all_[0].layer.dense_bytes for name, all_ in uses.items()}
        self._numbers = {name: number for number, name in enumerate(uses, start=1)}
        self._progress = progress
        self._last: list[Step] = []

    def of(self, task: str, batches: int) -> Callable[[int, str], None]:
        self.finish()
        total = sum(self._sizes.values())

        def starting(batch: int, name: str) -> None:
            number = self._numbers[name]
            done = (batch - 1) * total + sum(list(self._sizes.values())[: number - 1])
            all_bytes = max(batches * total, done)
            self._last = [Step(task, len(self._sizes), len(self._sizes), "", all_bytes, all_bytes)]
            self._progress(Step(task, number, len(self._sizes), name, done, all_bytes))

        return starting

    def finish(self) -> None:
        for step in self._last:
            self._progress(step)
        self._last = []


@contextmanager
def seeded() -> Iterator[None]:
    """Let all random numbers begin at the same point: a task may shuffle its batches."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
