"""export_onnx(): a compressed checkpoint in, an ONNX model out that computes with its factors."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tcompress.checkpoint.manifest import Entry, is_compressed
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.unchanged import Witness
from tcompress.errors import TaskError, TcompressError, UsageError, VerifyError
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import Packed
from tcompress.workflow.decoding import view
from tcompress.workflow.latency import WAY_OUT, Inputs, given_inputs
from tcompress.workflow.loading import load_into
from tcompress.workflow.matching import places_in, without_prefix
from tcompress.workflow.onnx_file import (
    MOST_BYTES,
    OnnxModel,
    OnnxSession,
    exported,
    relative_difference,
    require_packages,
    tensors_in,
)
from tcompress.workflow.onnx_layers import ExportedLayer, Plain
from tcompress.workflow.results import Stored, describe
from tcompress.workflow.task import Task
from tcompress.workflow.user_code import failed

NEEDS = ("model",)  # functions that a task must have for export_onnx(), and those that are used if there
USES = ("example_inputs", "calibration_batches", "dynamic_shapes")
SUFFIXES = (".onnx",)
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)  # the check takes sizes that the trace has not seen
ALLOWED = {torch.float32: 1e-3, torch.float16: 2e-2}  # relative difference; of other types there are no models
_CPU = torch.device("cpu")
LOADED_DENSE = " is loaded dense: "


@dataclass(frozen=True)
class ExportResult:
    """One run of ``export_onnx``.

    nbytes: of the ONNX file. dense_bytes: of all tensors of the checkpoint, decompressed. operators: how many nodes of
    each kind the graph has. inputs: which function of the task they come from. differences: batch size -> largest
    difference between ONNX Runtime and torch, relative to the largest value of an output.
    """

    source: Stored
    task: str
    path: Path
    nbytes: int
    dense_bytes: int
    layers: tuple[ExportedLayer, ...]
    operators: Mapping[str, int]
    opset: int
    inputs: str
    differences: Mapping[int, float]
    allowed: float
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class _Loaded:
    """A model with its weights. entries: name in the model -> name in the checkpoint, and its entry in the manifest.

    problems: name in the model -> why its compressed weight was loaded dense. half: whether it computes in float16.
    """

    model: nn.Module
    entries: Mapping[str, tuple[str, Entry]]
    problems: Mapping[str, str]
    notes: tuple[str, ...]
    half: bool


@dataclass(frozen=True)
class _Calls:
    """traced: what the model is traced with, and which of its sizes are open. expected: torch's answers to calls.

    called: the factorised layers that were called for them.
    """

    traced: Inputs
    dynamic_shapes: Any
    expected: Mapping[int, tuple[Inputs, list[Tensor]]]
    called: frozenset[nn.Module]


def export_onnx(
    checkpoint: Checkpoint, task: Task, *, out: Path, strip_prefix: str = "", force: bool = False
) -> ExportResult:
    """Write a compressed model as ONNX, whose layers compute with the factors, and check it with ONNX Runtime.

    A layer becomes one with a dense weight where its factors would not save multiplications. Codes and bitmasks are
    unpacked, models of a type other than float32 and float16 become float32. The batch size stays open, other sizes are
    those of the inputs; ``dynamic_shapes()`` of the task may say otherwise, as ``torch.export.export`` takes it.

    task: loaded with ``NEEDS`` and ``USES``. strip_prefix: what the checkpoint's names have in front of the model's.

    Raises UsageError when a package is missing, the checkpoint is dense, ``out`` has another suffix, the task gives no
    inputs, or the model is too large for one file; InputError when weights and model do not fit; OutputError when
    ``out`` exists or cannot be written; TaskError when the task's code fails, or torch cannot export its model;
    VerifyError, with nothing written, when ONNX Runtime refuses the model or its answers differ.
    """
    started = time.perf_counter()
    inputs = _required(checkpoint, task, out)
    witness, dense = Witness.of(checkpoint.files), view(checkpoint)
    with Output(out, is_folder=False, force=force, inputs=[*checkpoint.files, task.path]) as output:
        loaded = _load(checkpoint, task, strip_prefix)
        calls = _calls(loaded, inputs, task)
        layers = Plain(loaded.model, calls.called).replace(loaded.entries, loaded.problems)
        _require_size(loaded.model, out)
        made = _exported(loaded.model, calls, task)
        output.require_space(len(made.content))
        output.draft.write_bytes(made.content)
        allowed = ALLOWED[torch.float16 if loaded.half else torch.float32]
        differences = _differences(OnnxSession(output.draft, out), calls, allowed, task, out)
        witness.require_unchanged()
        output.commit()
    return ExportResult(
        source=describe(checkpoint),
        task=task.spec,
        path=out,
        nbytes=len(made.content),
        dense_bytes=sum(info.nbytes for name, info in dense.infos.items() if name not in dense.manifest.tied),
        layers=layers,
        operators=made.operators,
        opset=made.opset,
        inputs=inputs.origin,
        differences=differences,
        allowed=allowed,
        notes=loaded.notes,
        seconds=time.perf_counter() - started,
    )


def _required(checkpoint: Checkpoint, task: Task, out: Path) -> Inputs:
    """Return the task's inputs. Raises UsageError for whatever is missing, before any work."""
    require_packages()
    if out.suffix not in SUFFIXES:
        raise UsageError(f"must end with {' or '.join(SUFFIXES)}", path=out)
    if not is_compressed(checkpoint):
        raise UsageError("is not a compressed checkpoint; make one with `tcompress compress`", path=checkpoint.path)
    inputs = given_inputs(task)
    if inputs is None:
        raise UsageError(f"has neither example_inputs nor calibration_batches; {WAY_OUT}", path=task.path)
    return inputs


def _load(checkpoint: Checkpoint, task: Task, strip_prefix: str) -> _Loaded:
    manifest, model = view(checkpoint).manifest, task.model()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_into(model, checkpoint, strip_prefix=strip_prefix, cache="never").cpu().eval()
    names = without_prefix(manifest.layers, strip_prefix, checkpoint.path)
    problems = dict(str(each.message).split(LOADED_DENSE, 1) for each in said if LOADED_DENSE in str(each.message))
    model.requires_grad_(False)
    types = {place.dtype for place in places_in(model).values() if place.dtype.is_floating_point}
    notes = []
    others = types - set(ALLOWED)
    if others:
        # ONNX Runtime has next to no kernels for these on a CPU, so that nothing could be checked.
        listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in others))
        notes.append(f"everything is in float32: ONNX Runtime cannot run {listed} on a CPU")
        model, types = model.float(), {torch.float32}
    if any(isinstance(module, Packed) for module in model.modules()):
        notes.append("codes and bitmasks are unpacked: the ONNX file holds values")
    entries = {short: (full, manifest.layers[full]) for short, full in names.items()}
    if isinstance(model, Factorized):  # a model that is a single layer, which cannot be replaced inside of itself
        model, entries = nn.Sequential(model).eval(), {f"0.{name}": entry for name, entry in entries.items()}
    return _Loaded(model, entries, problems, tuple(notes), half=torch.float16 in types)


def _calls(loaded: _Loaded, inputs: Inputs, task: Task) -> _Calls:
    """Run the model in torch. Raises TaskError when it does not accept the inputs."""
    if not loaded.half:
        arguments, named = pytree.tree_map(_in_float32, (inputs.arguments, dict(inputs.named)))
        inputs = Inputs(arguments, named, inputs.origin)
    try:
        tensors = tensors_in((inputs.arguments, inputs.named))
        own = next((len(tensor) for tensor in tensors if tensor.dim()), 0)
        sizes: tuple[int, ...] = CHECKED_BATCHES
        if task.has("dynamic_shapes"):
            shapes, traced, sizes = task.dynamic_shapes(), inputs.at_batch(own, _CPU), (own,)
        else:
            shapes, traced = _open_batch(inputs, own), inputs.at_batch(TRACED_BATCH, _CPU)
        expected = {}
        for size in sizes:
            call = inputs.at_batch(size, _CPU)
            with torch.no_grad(), _noted(loaded.model) as called:
                expected[size] = call, tensors_in(loaded.model(*call.arguments, **call.named))
    except TcompressError:
        raise
    except Exception as error:
        raise failed(
            error, task.path, f"the model does not accept the inputs of {inputs.origin} ({WAY_OUT}): "
        ) from error
    return _Calls(traced, shapes, expected, frozenset(called))


@contextlib.contextmanager
def _noted(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Give the factorised layers that are called meanwhile."""
    called: set[nn.Module] = set()
    layers = {module for module in model.modules() if isinstance(module, Factorized)}
    hooks = [layer.register_forward_pre_hook(lambda module, _: called.add(module)) for layer in layers]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _open_batch(inputs: Inputs, own: int) -> Any:
    """Return which sizes are open: the first of every tensor that has a batch."""
    batch = torch.export.Dim("batch")

    def sizes(value: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(value, Tensor) and value.dim() and len(value) == own else None

    return pytree.tree_map(sizes, dict(inputs.named) or inputs.arguments)


def _require_size(model: nn.Module, out: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    if nbytes > MOST_BYTES:
        raise UsageError(
            f"would take {nbytes} bytes, an ONNX file holds {MOST_BYTES}; compress the model more", path=out
        )


def _exported(model: nn.Module, calls: _Calls, task: Task) -> OnnxModel:
    try:
        return exported(model, calls.traced, calls.dynamic_shapes)
    except TcompressError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch's own words are all about its exporter
            cause = cause.__cause__
        reason = next(iter(str(cause).strip().splitlines()), "")
        problem = f"torch cannot export the model as ONNX: {type(cause).__name__}: {reason}"
        raise TaskError(problem, path=task.path) from error


def _differences(session: OnnxSession, calls: _Calls, allowed: float, task: Task, out: Path) -> dict[int, float]:
    """Return the difference by batch size. Raises VerifyError when one is too large, TaskError for a closed batch."""
    if len(calls.expected) > 1 and not session.takes_any_batch:
        # torch falls back to the size that it was shown, without a word.
        raise TaskError(
            f"torch exports the model for batches of {TRACED_BATCH} only: its code takes the batch size as a number "
            "somewhere, as len(x) does; use x.shape[0], or write def dynamic_shapes() -> tuple | dict",
            path=task.path,
        )
    found = {size: relative_difference(session.run(call), answers) for size, (call, answers) in calls.expected.items()}
    for size, difference in found.items():
        if not difference <= allowed:
            raise VerifyError(
                f"ONNX Runtime's answers differ from torch's by {difference:.2g} of the largest value at batch size "
                f"{size}, more than {allowed:g}; nothing was written",
                path=out,
            )
    return found
