"""Sequential reconstruction: fed by what is compressed before it, a layer is to give what the dense model gave.

Letters: W (out, n) = the layer's weight as its matrix; X0, X (n, positions) = its inputs in the dense model and in the
one that is compressed so far; G = X XT and C = X0 XT, (n, n), both over the number of positions.

||W X0 - W' X||² is, but for a constant, ||(T - W') G^(1/2)||² with T = W C G^-1: the same problem as without a prefix,
with another weight. So every format that can minimise the error of a layer's output can do this. G is damped by a
part of its mean diagonal, and T with it: where the inputs say nothing, W' stays near W.

J. Frantar, D. Alistarh, "Optimal brain compression", 2022: least squares layer by layer.
AA-SVD, 2026: inputs from the compressed prefix, targets from the dense model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint.integrity import fingerprint
from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError
from tcompress.workflow.task import Task
from tcompress.workflow.tracing import Traced, Use, as_call, calibration_inputs, load_traced, rows_of

_DAMPING = 0.01  # of the mean diagonal of G
_LARGEST = 1 << 13  # inputs of a layer above which its moments, squared, are not formed


@dataclass(frozen=True)
class Aim:
    """What a layer is to become: near ``target`` in the metric of ``gram``.

    target: of the weight's shape. gram: (n, n). cross: W C, (out, n); power: mean ||W x0||² of a position; undamped:
    G as it was measured. The last three say how far the output is from the dense model's.
    """

    target: Tensor
    gram: Tensor
    cross: Tensor
    undamped: Tensor
    power: float

    def output_error(self, weight: Tensor) -> float:
        """Return ||W X0 - W' X|| / ||W X0|| over the calibration inputs."""
        matrix = weight.reshape(self.cross.shape).double()
        square = self.power - 2 * float((matrix * self.cross).sum()) + float((matrix @ self.undamped * matrix).sum())
        return (max(square, 0.0) / self.power) ** 0.5 if self.power else 0.0


class _Reached(Exception):  # noqa: N818 - no error: it ends a run of the model where nothing more is needed
    """The layer was reached."""


class Reconstruction:
    """The model as it was, and as it is with the layers that are done: a device's memory holds it twice.

    repair: whether biases and normalisations may be changed once all layers are done.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: Task,
        *,
        strip_prefix: str = "",
        device: torch.device | None = None,
        repair: bool = True,
    ) -> None:
        self._path = checkpoint.path
        self.strip_prefix = strip_prefix
        self.repair = repair
        self.batches = calibration_inputs(task)
        device = device or torch.device("cpu")
        self.dense, self.prefix = (
            load_traced(checkpoint, task, self.batches, strip_prefix=strip_prefix, device=device) for _ in range(2)
        )
        self.fingerprint = {
            "task": task.spec,
            "code": hashlib.sha256(task.path.read_bytes()).hexdigest(),
            "strip_prefix": strip_prefix,
            "repair": repair,
            "inputs": fingerprint(tensor.cpu() for batch in self.batches for tensor in _tensors(batch)),
        }
        self._positions = {use.layer.name: at for at, use in reversed(list(enumerate(self.dense.uses)))}
        self._share = _shared_inputs(self.dense, self.batches[0])
        self._known: tuple[int, _Moments] | None = None

    def ordered(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return the layers in the order in which the model calls them; those that it never calls come last."""
        return sorted(layers, key=lambda layer: self._positions.get(layer.name, len(self._positions)))

    def aim(self, layer: Layer, weight: Tensor) -> Aim | None:
        """Return what the layer is to become; None for one whose input is no vector, or is not known.

        Raises NumericalError for inputs that are not finite.
        """
        at = self._positions.get(layer.name)
        if at is None or layer.kind is LayerKind.EMBEDDING:
            return None
        uses = [use for use in self.dense.uses if use.layer.name == layer.name]
        if len(uses) != 1 or weight[0].numel() > _LARGEST:
            return None  # several uses have inputs at different depths
        moments = self._moments(at)
        if not bool(torch.isfinite(moments.gram).all()) or not bool(torch.isfinite(moments.cross).all()):
            raise NumericalError(
                "its inputs are not finite on the calibration batches", path=self._path, tensor=layer.name
            )
        return _aim(weight, moments)

    def restart(self) -> None:
        """Let the prefix be the dense model again, for another compression of it."""
        self.prefix.model.load_state_dict(self.dense.model.state_dict())
        self._known = None

    def install(self, layer: Layer, weight: Tensor) -> None:
        """Let the prefix have the layer as it is stored."""
        for use in self.prefix.uses:
            if use.layer.name == layer.name:
                held = getattr(use.module, use.attribute)
                with torch.no_grad():
                    held.copy_(weight)

    def _moments(self, at: int) -> _Moments:
        key = self._share[at]
        if self._known is None or self._known[0] != key:
            self._known = (key, self._measured(at))
        return self._known[1]

    def _measured(self, at: int) -> _Moments:
        use, other = self.dense.uses[at], self.prefix.uses[at]
        moments = _Moments()
        for batch in self.batches:
            was, now = _input_of(self.dense, use, batch), _input_of(self.prefix, other, batch)
            moments.add(rows_of(use.module, was), rows_of(other.module, now))
        return moments


def _tensors(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch, in their order."""
    arguments, named = as_call(batch)
    yield from (value for value in (*arguments, *named.values()) if isinstance(value, Tensor))


class _Moments:
    """gram: of X, cross: X0 XT, dense: of X0; (n, n) in float64, means over positions."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._count = 0

    def add(self, was: Tensor, now: Tensor) -> None:
        """was, now: (positions, n), in the dense model and behind the prefix."""
        products = [(now.T @ now).double(), (was.T @ now).double(), (was.T @ was).double()]
        self._sums = products if not self._sums else [a.add_(b) for a, b in zip(self._sums, products, strict=True)]
        self._count += len(now)

    @property
    def gram(self) -> Tensor:
        return self._sums[0] / self._count

    @property
    def cross(self) -> Tensor:
        return self._sums[1] / self._count

    @property
    def dense(self) -> Tensor:
        return self._sums[2] / self._count


def _aim(weight: Tensor, moments: _Moments) -> Aim:
    matrix = weight.reshape(len(weight), -1).double().to(moments.gram.device)
    gram = moments.gram
    cross = matrix @ moments.cross
    damping = _DAMPING * float(gram.diagonal().mean())
    if damping == 0:
        damping = 1.0  # no input at all: nothing is better than the weight itself
    damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    target = torch.cholesky_solve((cross + damping * matrix).T, factor).T
    power = float((matrix @ moments.dense * matrix).sum())
    working = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return Aim(target.to(working).reshape(weight.shape), damped.to(working), cross, gram, max(power, 0.0))


def _input_of(traced: Traced, use: Use, batch: Any) -> Tensor:
    """Return what the module gets as input, and do not run the model further than there."""
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        found.append((arguments or tuple(named.values()))[0].detach())
        raise _Reached

    handle = use.module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        traced.run(batch, until=_Reached)
    finally:
        handle.remove()
    return found[0]


def _shared_inputs(traced: Traced, batch: Any) -> list[int]:
    """Return for each use the position of the first that gets the very same input, and looks at it alike."""
    kept: list[tuple[Use, Tensor, int]] = []  # with the number of changes in place at that moment
    handles = []

    def watch(use: Use) -> Callable[..., None]:
        def keep(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            x = (arguments or tuple(named.values()))[0]
            kept.append((use, x, x._version))

        return keep

    for use in traced.uses:
        handles.append(use.module.register_forward_pre_hook(watch(use), with_kwargs=True))
    try:
        traced.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    first: dict[tuple[Any, ...], int] = {}
    inputs = {id(use): (x, version) for use, x, version in reversed(kept)}
    shared = []
    for at, use in enumerate(traced.uses):
        key: tuple[Any, ...] = (at,)
        if isinstance(use.module, nn.Linear) and id(use) in inputs:
            x, version = inputs[id(use)]
            key = (x.data_ptr(), x.shape, x.stride(), version)
        shared.append(first.setdefault(key, at))
    return shared
