"""How much the model's objective moves with each channel of a layer's output.

Letters: y (positions, out) = what a layer gives; L = the objective, summed over the samples of a batch; s (out,) = the
mean over positions of (dL/dy_i)².

L is the task's loss where it has one with batches for it: s is then the diagonal of an empirical Fisher information.
Without labels it is v . f(x), random signs v times everything that the model gives: the mean of (dL/dy)² over signs is
the squared norm of the Jacobian's column, so that s says how far the output moves.

J. Martens, "New insights and perspectives on the natural gradient method", 2020: the empirical Fisher information.
M. F. Hutchinson, "A stochastic estimator of the trace", 1989: random signs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError, TaskError, TcompressError
from tcompress.workflow.samples import samples_in, tensors_in
from tcompress.workflow.task import Task
from tcompress.workflow.tracing import Traced, Use, on_device
from tcompress.workflow.user_code import failed

MOST_LOSS_BATCHES = 256  # a task may give whole epochs, or go on for ever
_SIGNS_SEED = 0


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer. values: s, float64; positions_per_sample: of y."""

    values: Tensor
    positions_per_sample: float


@dataclass(frozen=True)
class Sensitivities:
    """Of all layers by name. of: ``loss`` or ``output``."""

    of: str
    layers: Mapping[str, Sensitivity]
    notes: tuple[str, ...]


def sensitivities(
    traced: Traced,
    task: Task,
    batches: Sequence[Any],
    uses: Mapping[str, Sequence[Use]],
    *,
    checkpoint: Checkpoint,
    starting: Callable[[int, str], None],
) -> Sensitivities:
    """Measure the layers of ``uses``, a backward pass a batch; a weight in several modules is one layer.

    starting: is told the number of a batch and the name of a layer whenever one is called. Raises TaskError where
    objective or gradient cannot be had, NumericalError for a gradient with NaN or Inf.
    """
    by_loss = task.has("loss") and task.has("train_batches")
    found, notes = _Gradients(uses, starting), []
    handles = [
        use.module.register_forward_hook(found.watch(name, use.module)) for name, all_ in uses.items() for use in all_
    ]
    objectives = _losses(traced, task) if by_loss else _probes(traced, batches)
    which = "train_batches" if by_loss else "calibration_batches"
    try:
        with torch.enable_grad():
            for number in range(1, MOST_LOSS_BATCHES + 1 if by_loss else len(batches) + 1):
                found.batch = number
                objective, samples = next(objectives, (None, 0))
                if objective is None:
                    break
                _backward(objective, task, f"batch {number} of {which}")
                found.samples += samples
                found.require_finite(f"batch {number} of {which}", checkpoint)
    finally:
        for handle in handles:
            handle.remove()
    if found.samples == 0:
        raise TaskError(f"{which} gives no batch", path=task.path)
    if by_loss and found.batch == MOST_LOSS_BATCHES:
        notes.append(f"of train_batches the first {MOST_LOSS_BATCHES} were taken, if there are more")
    notes += [f"no gradient reaches {name}: its sensitivity is zero" for name in found.unreached()]
    return Sensitivities("loss" if by_loss else "output", found.finish(), tuple(notes))


class _Gradients:
    """Sums of (dL/dy_i)² by layer, in float64 on the CPU."""

    def __init__(self, uses: Mapping[str, Sequence[Use]], starting: Callable[[int, str], None]) -> None:
        self.samples, self.batch = 0, 0
        self._starting = starting
        self._sums = {name: torch.zeros(_channels(of[0].module), dtype=torch.float64) for name, of in uses.items()}
        self._positions = dict.fromkeys(uses, 0)
        self._reached: set[str] = set()

    def watch(self, name: str, module: nn.Module) -> Callable[..., Tensor | None]:
        """Return a hook that looks at the gradient of what the module gives."""

        def keep(_: nn.Module, __: Any, y: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            self._starting(self.batch, name)
            axis = -1 - (len(module.kernel_size) if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 0)
            self._positions[name] += y.numel() // y.shape[axis]
            # Parameters ask for no gradients: where the graph begins y does. It goes on as a copy: a leaf cannot be
            # changed in place, and a view can, but would leave the hook behind.
            tracked = y if y.requires_grad else y.detach().requires_grad_()
            tracked = tracked.clone() if tracked is not y or y._is_view() else y
            tracked.register_hook(lambda gradient: self._add(name, gradient.movedim(axis, -1)))  # type: ignore[no-untyped-call]
            return tracked

        return keep

    def _add(self, name: str, gradient: Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._sums[name].add_(rows.square().sum(dim=0, dtype=torch.float64).cpu())
        self._reached.add(name)

    def require_finite(self, batch: str, checkpoint: Checkpoint) -> None:
        for name, total in self._sums.items():
            if not bool(torch.isfinite(total).all()):
                raise NumericalError(
                    f"the gradient of its output is not finite on {batch}", path=checkpoint.path, tensor=name
                )

    def unreached(self) -> list[str]:
        return [name for name in self._sums if name not in self._reached]

    def finish(self) -> dict[str, Sensitivity]:
        return {
            name: Sensitivity(total / max(self._positions[name], 1), self._positions[name] / self.samples)
            for name, total in self._sums.items()
        }


def _channels(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)  # noqa: S101
    return len(module.weight)


def _losses(traced: Traced, task: Task) -> Iterator[tuple[Tensor, int]]:
    """Yield the loss of each batch, times its samples: a loss is the mean over them, as a rule."""
    for batch in islice(task.train_batches(), MOST_LOSS_BATCHES):
        samples = samples_in(batch)
        yield task.loss(traced.model, on_device(batch, traced.device)) * samples, samples


def _probes(traced: Traced, batches: Sequence[Any]) -> Iterator[tuple[Tensor, int]]:
    """Yield random signs times all floating values that the model gives."""
    generator = torch.Generator().manual_seed(_SIGNS_SEED)
    for batch in batches:
        found = [tensor for tensor in tensors_in(traced.call(batch)) if tensor.is_floating_point()]
        total = torch.zeros((), device=traced.device)
        for tensor in found:
            signs = torch.randint(0, 2, tensor.shape, generator=generator).mul_(2).sub_(1)
            total = total + (tensor * signs.to(tensor.device, tensor.dtype)).sum(dtype=torch.float32)
        yield total, samples_in(batch)


def _backward(objective: Tensor, task: Task, batch: str) -> None:
    if not objective.requires_grad:
        raise TaskError(f"the gradient of {batch} does not reach a layer; is it detached, or no_grad?", path=task.path)
    try:
        objective.backward()  # type: ignore[no-untyped-call]
    except TcompressError:
        raise
    except Exception as error:
        raise failed(error, task.path, f"the gradient of {batch} cannot be had: ") from error
