"""evaluate(): what a compressed model is worth: its scores, bytes, latency and memory beside the dense one's."""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import UsageError
from tcompress.workflow.decoding import view
from tcompress.workflow.latency import WAY_OUT, Inputs, given_inputs, median_milliseconds, read_call, written_call
from tcompress.workflow.loading import load_into, load_state_dict
from tcompress.workflow.processes import in_fresh_process
from tcompress.workflow.results import describe, peak_memory_bytes
from tcompress.workflow.task import Task, load_task

NEEDS = ("model", "evaluate")  # functions that a task must have for evaluate(), and those that are used if there
USES = ("example_inputs", "calibration_batches")


@dataclass(frozen=True)
class ModelFigures:
    """What was measured of one model.

    name: ``dense``, ``decompressed`` or ``compressed``. nbytes: on disk; of a decompressed one, which has no file, the
    bytes of its tensors. latency_ms: batch size -> median time of one call, empty where it could not be measured.
    peak_memory_bytes: resident memory at most, from loading to the end of ``evaluate``, beyond what the process had
    after imports. peak_gpu_bytes: the same of the GPU's memory, None without one. seconds: loading and evaluating.
    """

    name: str
    path: Path
    nbytes: int
    scores: Mapping[str, float]
    latency_ms: Mapping[int, float]
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """One run of ``evaluate``. inputs: which function of the task the latency's inputs come from, if any."""

    task: str
    dense: ModelFigures
    compressed: ModelFigures
    inputs: str | None
    device: str
    threads: int
    cache: str
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class _Job:
    """One model, and how it is loaded: plain values, that another process can be told."""

    name: str
    task: str
    source: Path
    key: str | None
    nbytes: int
    strip_prefix: str
    cache: str
    device: str
    threads: int

    def load(self, task: Task) -> nn.Module:
        """Return the model with its weights, on its device, in evaluation mode."""
        model = task.model()
        with open_checkpoint(self.source, key=self.key) as checkpoint:
            if self.name == "compressed":
                model = load_into(model, checkpoint, strip_prefix=self.strip_prefix, cache=self.cache)
            else:
                load_state_dict(checkpoint, model, strip_prefix=self.strip_prefix)
        return model.to(self.device).eval()


@dataclass(frozen=True)
class _Answer:
    """What the process of one model found. inputs: those of the model's first call, as ``written_call`` has them."""

    scores: Mapping[str, float]
    peak_memory_bytes: int
    peak_gpu_bytes: int | None
    seconds: float
    inputs: bytes | None


def evaluate(
    compressed: Checkpoint,
    task: Task,
    *,
    against: Checkpoint | None = None,
    strip_prefix: str = "",
    cache: str = "auto",
    device: torch.device | None = None,
) -> Evaluation:
    """Evaluate a compressed model and the dense one side by side.

    Scores and memory come from a new process for each model, latencies from both models in this one, called in turns.
    Both begin with the same random seeds.

    task: loaded with ``NEEDS`` and ``USES``. against: the dense checkpoint; without it, the decompressed weights.
    strip_prefix: what the checkpoint's names have in front of the model's. cache: as in ``load_into``.

    Raises UsageError when ``compressed`` is not compressed, or ``against`` is; TaskError when the task's code fails, a
    process dies, or the model does not accept the inputs; InputError and UsageError when weights and model do not fit.
    """
    started = time.perf_counter()
    _refuse(compressed, against)
    device = device or torch.device("cpu")
    options = (strip_prefix, cache, str(device), torch.get_num_threads())
    source = compressed if against is None else against
    name = "decompressed" if against is None else "dense"
    dense_bytes = _decompressed_bytes(compressed) if against is None else describe(against).nbytes
    jobs = (
        _Job(name, task.spec, source.path, source.key, dense_bytes, *options),
        _Job("compressed", task.spec, compressed.path, compressed.key, describe(compressed).nbytes, *options),
    )
    inputs = given_inputs(task)
    # Inputs that the task gives are tried first: evaluating may take hours, and a mistake in them should not.
    latencies = None if inputs is None else _latencies(task, jobs, inputs, device)
    answers = [
        in_fresh_process(_measure, job, doing=f"evaluating the {job.name} model", path=task.path) for job in jobs
    ]
    if latencies is None:
        inputs = _captured(answers)
        latencies = [{}, {}] if inputs is None else _latencies(task, jobs, inputs, device)
    dense, small = (_figures(*each) for each in zip(jobs, answers, latencies, strict=True))
    return Evaluation(
        task=task.spec,
        dense=dense,
        compressed=small,
        inputs=None if inputs is None else inputs.origin,
        device=str(device),
        threads=torch.get_num_threads(),
        cache=cache,
        notes=_notes(inputs, dense, small),
        seconds=time.perf_counter() - started,
    )


def _refuse(compressed: Checkpoint, against: Checkpoint | None) -> None:
    if not is_compressed(compressed):
        way_out = "make one with `tcompress compress`, and give this one as --against"
        raise UsageError(f"is not a compressed checkpoint; {way_out}", path=compressed.path)
    if against is not None and is_compressed(against):
        raise UsageError("is compressed itself; give the checkpoint it was made from, or none", path=against.path)


def _decompressed_bytes(compressed: Checkpoint) -> int:
    dense = view(compressed)
    return sum(info.nbytes for name, info in dense.infos.items() if name not in dense.manifest.tied)


def _latencies(task: Task, jobs: Sequence[_Job], inputs: Inputs, device: torch.device) -> list[dict[int, float]]:
    models = [job.load(task) for job in jobs]
    return median_milliseconds(models, inputs, device=device, path=task.path)


def _measure(job: _Job) -> _Answer:
    """Load and evaluate one model; runs in a process of its own."""
    torch.set_num_threads(job.threads)
    _seed()
    task = load_task(job.task, NEEDS, USES)
    device = torch.device(job.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.zeros(1, device=device)  # the driver's own memory is no part of the model
        torch.cuda.reset_peak_memory_stats(device)
    before = _restart_peak()
    started = time.perf_counter()
    model = job.load(task)
    calls: list[bytes | None] = []

    def keep_first(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not calls:
            calls.append(written_call(arguments, named))

    model.register_forward_pre_hook(keep_first, with_kwargs=True)
    with torch.inference_mode():
        scores = task.evaluate(model)
    seconds = time.perf_counter() - started
    peak = max(peak_memory_bytes() - before, 0)
    gpu = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return _Answer(scores, peak, gpu, seconds, calls[0] if calls else None)


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _restart_peak() -> int:
    """Begin to measure peak memory here, where the system can, and return the bytes to be taken off."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
    return peak_memory_bytes()


def _captured(answers: Sequence[_Answer]) -> Inputs | None:
    first = next((answer.inputs for answer in answers if answer.inputs is not None), None)
    return None if first is None else read_call(first, "evaluate")


def _figures(job: _Job, answer: _Answer, latency_ms: Mapping[int, float]) -> ModelFigures:
    return ModelFigures(
        name=job.name,
        path=job.source,
        nbytes=job.nbytes,
        scores=answer.scores,
        latency_ms=latency_ms,
        peak_memory_bytes=answer.peak_memory_bytes,
        peak_gpu_bytes=answer.peak_gpu_bytes,
        seconds=answer.seconds,
    )


def _notes(inputs: Inputs | None, dense: ModelFigures, compressed: ModelFigures) -> tuple[str, ...]:
    notes = []
    if dense.name == "decompressed":
        notes.append("decompressed: the weights are those of the compressed model; --against MODEL gives the original")
    if inputs is None:
        notes.append(f"latency was not measured: evaluate never called the model with tensors; {WAY_OUT}")
    alone = sorted(set(dense.scores) ^ set(compressed.scores))
    if alone:
        notes.append(f"evaluate gave these scores for one of the two models only: {', '.join(alone)}")
    return tuple(notes)
