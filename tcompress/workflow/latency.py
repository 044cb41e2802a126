"""How long a model takes for one call: models side by side, on the same inputs, in turns."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.errors import TaskError, TcompressError
from tcompress.workflow.task import Task
from tcompress.workflow.user_code import failed

BATCH_SIZES = (1, 32)
WARM_UP_CALLS = 3  # the first calls choose kernels and rebuild weights
_SECONDS = 2.0  # measured per batch size, all models together
_LEAST_ROUNDS, _MOST_ROUNDS = 7, 200
WAY_OUT = "write: def example_inputs() -> torch.Tensor | tuple | dict, inputs of the model with the batch size first"


@dataclass(frozen=True)
class Inputs:
    """One call of a model. origin: which function of the task it comes from."""

    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    origin: str

    def at_batch(self, size: int, device: torch.device) -> Inputs:
        """Return the call with ``size`` samples: every tensor (batch, ...) is cut or repeated along dimension 0.

        Tensors of another first dimension stay as they are. Raises ValueError when no tensor has a batch.
        """
        batches: list[int] = []
        _each((self.arguments, dict(self.named)), lambda tensor: batches.extend(tensor.shape[:1]))
        if not batches or batches[0] == 0:
            raise ValueError("hold no tensor whose first dimension is a batch")

        def resize(tensor: Tensor) -> Tensor:
            if tensor.dim() > 0 and len(tensor) == batches[0]:
                tensor = tensor[torch.arange(size, device=tensor.device) % len(tensor)]
            return tensor.to(device)

        return Inputs(_each(self.arguments, resize), _each(dict(self.named), resize), self.origin)


def given_inputs(task: Task) -> Inputs | None:
    """Return the inputs that a task gives, its example first, else its first batch for calibration, else None.

    Raises TaskError when they are neither tensor, tuple nor dict, or there is no batch.
    """
    if task.has("example_inputs"):
        return _call_of(task.example_inputs(), "example_inputs", task.path)
    if not task.has("calibration_batches"):
        return None
    for batch in task.calibration_batches():
        return _call_of(batch, "calibration_batches", task.path)
    raise TaskError("calibration_batches gives no batch", path=task.path)


def written_call(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> bytes | None:
    """Return a call as bytes for ``read_call``; None where it has no batch, or more than tensors and plain values."""
    call = Inputs(arguments, named, "")
    if not _is_plain((arguments, dict(named))):
        return None
    try:
        call = call.at_batch(max(BATCH_SIZES), torch.device("cpu"))
    except ValueError:
        return None
    file = io.BytesIO()
    torch.save((call.arguments, call.named), file)
    return file.getvalue()


def read_call(written: bytes, origin: str) -> Inputs:
    """Return what ``written_call`` wrote."""
    arguments, named = torch.load(io.BytesIO(written), weights_only=True)
    return Inputs(arguments, named, origin)


def median_milliseconds(
    models: Sequence[nn.Module], inputs: Inputs, *, device: torch.device, path: Path
) -> list[dict[int, float]]:
    """Return for each model the median time of a call, in ms, by batch size. The models are timed in turns.

    path: the task file, which the inputs come from. Raises TaskError when a model does not accept them.
    """
    found: list[dict[int, float]] = [{} for _ in models]
    for size in BATCH_SIZES:
        try:
            call = inputs.at_batch(size, device)
            with torch.inference_mode():
                medians = _medians([partial(model, *call.arguments, **call.named) for model in models], device)
        except TcompressError:
            raise
        except Exception as error:
            why = f"the model does not accept the inputs of {inputs.origin} at batch size {size} ({WAY_OUT}): "
            raise failed(error, path, why) from error
        for times, median in zip(found, medians, strict=True):
            times[size] = median
    return found


def _medians(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    for call in calls:
        for _ in range(WARM_UP_CALLS):
            call()
    one_round = sum(_milliseconds(call, device) for call in calls) / 1000
    rounds = int(min(max(_SECONDS / max(one_round, 1e-9), _LEAST_ROUNDS), _MOST_ROUNDS))
    # In turns: what else the machine does, and how warm it is, then strikes all models alike.
    times = [[_milliseconds(call, device) for call in calls] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    started = time.perf_counter()
    call()
    _finish(device)
    return (time.perf_counter() - started) * 1000


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _call_of(given: Any, origin: str, path: Path) -> Inputs:
    if isinstance(given, Tensor):
        return Inputs((given,), {}, origin)
    if isinstance(given, Mapping) and all(isinstance(name, str) for name in given):
        return Inputs((), dict(given), origin)
    if isinstance(given, tuple | list):
        return Inputs(tuple(given), {}, origin)
    raise TaskError(
        f"{origin} gives {type(given).__name__}; it must give a tensor, tuple or dict of tensors", path=path
    )


def _each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to every tensor in tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _each(each, change) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_each(each, change) for each in value)
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, Tensor | bool | int | float | str)
