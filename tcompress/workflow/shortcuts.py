"""Where a layer's output meets a shortcut: the sum that it goes into, of which the other summand is off as well.

z -> (batch normalisation, dropout) -> z' + s: what is compressed before the layer has moved s from the s0 of the dense
model. The layer can make good what of s0 - s its input tells. Found by hooks and by watching additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from tcompress.errors import TaskError
from tcompress.workflow.tracing import Traced, Use

_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
_PASSING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)
_SMALLEST = 1e-6  # of the largest scale: what a batch normalisation makes smaller is not blown up again


class _Reached(Exception):  # noqa: N818 - no error: it ends a run of the model where nothing more is needed
    """What was looked for has been seen."""


@dataclass(frozen=True)
class Meeting:
    """Input of a module, and what its output is added to, in units and in the shape of this output."""

    input: Tensor
    other: Tensor


def has_shortcut(traced: Traced, use: Use, batch: Any) -> bool:
    """Tell whether the output of a module goes into a sum, with nothing but normalisations before it.

    The other summand may not depend on that output: making good what depends on oneself has no end.
    """
    if isinstance(use.module, nn.Embedding) or getattr(use.module, "groups", 1) != 1:
        return False
    try:
        with torch.enable_grad():
            other = _seen(traced.call, traced, use, batch).get("other")
    except TaskError:
        return False  # a model that runs, but not with gradients or while it is watched
    return other is not None and not other.requires_grad


def meeting(traced: Traced, use: Use, batch: Any) -> Meeting:
    """Return what meets where the output of a module that ``has_shortcut`` goes into a sum.

    Raises TaskError where a batch takes another way through the model.
    """
    seen = _seen(traced.run, traced, use, batch)
    if "other" not in seen:
        problem = f"{use.layer.name} is added to something on the first batch of calibration_batches, not on all"
        raise TaskError(problem, path=traced.path)
    return Meeting(seen["input"], seen["other"])


def _seen(run: Callable[..., Any], traced: Traced, use: Use, batch: Any) -> dict[str, Tensor]:
    """Run the model up to the sum that the module's output goes into, or to its end."""
    seen: dict[str, Tensor] = {}
    with _watched(traced.model, use.module, seen) as sums, sums:
        run(batch, until=_Reached)
    return seen


@contextmanager
def _watched(model: nn.Module, module: nn.Module, seen: dict[str, Tensor]) -> Iterator[_Sums]:
    """Follow the output of ``module`` through what only scales and shifts its channels."""
    sums = _Sums(seen)

    def start(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> Tensor:
        seen["input"] = (arguments or tuple(named.values()))[0].detach()
        if torch.is_grad_enabled():  # to see what depends on it; times 1, because leaves cannot be changed in place
            output = output.detach().requires_grad_() * 1
        sums.follow(output, None)
        return output

    def through(passed: nn.Module) -> Callable[..., None]:
        def step(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if arguments and sums.follows(arguments[0]):
                sums.follow(output, _scaled(sums.scale, passed, output))

        return step

    handles = [module.register_forward_hook(start, with_kwargs=True)]
    handles += [
        passed.register_forward_hook(through(passed))
        for passed in model.modules()
        if isinstance(passed, _PASSING) or (isinstance(passed, _BatchNorm) and passed.running_var is not None)
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


class _Sums(TorchFunctionMode):
    """Watches for the first sum of the tensor that is followed. scale: from the layer's output to it."""

    def __init__(self, seen: dict[str, Tensor]) -> None:
        super().__init__()
        self._seen = seen
        self._followed: Tensor | None = None
        self.scale: Tensor | None = None

    def follow(self, tensor: Tensor, scale: Tensor | None) -> None:
        self._followed, self.scale = tensor, scale

    def follows(self, tensor: Any) -> bool:
        return self._followed is not None and tensor is self._followed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_sum = getattr(func, "__name__", "") in _SUMS and len(args) == 2 and any(map(self.follows, args))
        if is_sum and self._followed is not None:
            other = args[1] if self.follows(args[0]) else args[0]
            is_alike = isinstance(other, Tensor) and other.shape == self._followed.shape
            if is_alike and not self.follows(other):
                self._seen["other"] = other if self.scale is None else other / self.scale
                raise _Reached
        return func(*args, **(kwargs or {}))


def _scaled(scale: Tensor | None, module: nn.Module, output: Tensor) -> Tensor | None:
    if not isinstance(module, _BatchNorm):
        return scale
    assert module.running_var is not None  # noqa: S101
    own = (module.running_var + module.eps).rsqrt()
    if module.affine:
        own = own * module.weight
    own = torch.where(own.abs() < _SMALLEST * float(own.abs().max()), torch.inf, own)
    own = own.reshape(1, -1, *[1] * (output.ndim - 2))
    return own if scale is None else scale * own
