"""The user's model with a checkpoint's dense weights: which modules compute with which weight, in which order.

Letters: n = inputs of a weight's matrix, its fan_in; a position is one column of inputs that the matrix is applied to.
Hooks alone: the model's code is neither read nor changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import TaskError, TcompressError
from tcompress.runtime.install import obstacle
from tcompress.workflow.loading import load_state_dict
from tcompress.workflow.matching import homes_of, places_in, without_prefix
from tcompress.workflow.task import Task
from tcompress.workflow.user_code import failed

_ROWS = 16384  # of one batch, at most
NEEDS = ("model", "calibration_batches")  # functions that a task must have to be traced


@dataclass(frozen=True)
class Use:
    """A module that computes with a layer's weight, which is its ``attribute``."""

    layer: Layer
    module: nn.Module
    attribute: str


@dataclass(frozen=True)
class Traced:
    """A model in evaluation mode. uses: in the order of their first call. untraced: layer -> why it has no use."""

    model: nn.Module
    uses: Sequence[Use]
    untraced: Mapping[str, str]
    device: torch.device
    path: Path
    _numbers: dict[int, int] = field(default_factory=dict)  # of batches, by identity, for messages

    def run(self, inputs: Any, *, until: type[BaseException] | None = None) -> Any:
        """Call the model with a tensor, a tuple of arguments or a dict of them by name; no gradients.

        until: an exception of a hook that ends the run. Raises TaskError that names the batch where it does not fit.
        """
        with torch.no_grad():
            return self.call(inputs, until=until)

    def call(self, inputs: Any, *, until: type[BaseException] | None = None) -> Any:
        """Do as ``run``, with gradients where they are on."""
        arguments, named = as_call(on_device(inputs, self.device))
        try:
            return self.model(*arguments, **named)
        except TcompressError:
            raise
        except Exception as error:
            if until is not None and isinstance(error, until):
                return None
            number = self._numbers.get(id(inputs))
            which = "" if number is None else f"batch {number} of calibration_batches does not fit the model: "
            raise failed(error, self.path, which) from error


def calibration_inputs(task: Task) -> list[Any]:
    """Return the task's calibration batches. Raises TaskError when there is none."""
    batches = list(task.calibration_batches())
    if not batches:
        raise TaskError("calibration_batches gives no batch", path=task.path)
    return batches


def load_traced(
    checkpoint: Checkpoint, task: Task, batches: Sequence[Any], *, strip_prefix: str = "", device: torch.device
) -> Traced:
    """Return the task's model with the weights of a dense checkpoint, traced on the first batch.

    Raises as ``load_state_dict``, and TaskError when the first batch does not fit the model.
    """
    model = task.model()
    load_state_dict(checkpoint, model, strip_prefix=strip_prefix)
    model = model.to(device).eval().requires_grad_(False)
    places = places_in(model)
    names = {stored: name for name, stored in without_prefix(checkpoint, strip_prefix, checkpoint.path).items()}
    homes = homes_of([names[layer.name] for layer in find_layers(checkpoint)], places)
    uses, untraced = [], {}
    for layer in find_layers(checkpoint):
        for place in homes[names[layer.name]]:
            problem = obstacle(place.module, place.attribute)
            if problem is None:
                uses.append(Use(layer, place.module, place.attribute))
            else:
                untraced[layer.name] = problem
    numbers = {id(batch): number for number, batch in enumerate(batches, start=1)}
    traced = Traced(model, uses, untraced, device, task.path, numbers)
    called = _calls(traced, batches[0])
    first = {id(module): at for at, module in reversed(list(enumerate(called)))}
    unique = {(use.layer.name, id(use.module)): use for use in uses}.values()
    found = sorted((use for use in unique if id(use.module) in first), key=lambda use: first[id(use.module)])
    traced_names = {use.layer.name for use in found}
    never = {use.layer.name: "the model does not call it" for use in uses if use.layer.name not in traced_names}
    untraced = {name: why for name, why in {**untraced, **never}.items() if name not in traced_names}
    return Traced(model, found, untraced, device, task.path, numbers)


def _calls(traced: Traced, batch: Any) -> list[nn.Module]:
    """Return the modules of all uses in the order in which they are called."""
    called: list[nn.Module] = []

    def note(module: nn.Module, _: Any) -> None:
        called.append(module)

    modules = {id(use.module): use.module for use in traced.uses}
    handles = [module.register_forward_pre_hook(note) for module in modules.values()]
    try:
        traced.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return called


def on_device(inputs: Any, device: torch.device) -> Any:
    """Return a batch on a device, every tensor in it; other values as they are."""
    match inputs:
        case Tensor():
            return inputs.to(device)
        case Mapping():
            return {name: on_device(value, device) for name, value in inputs.items()}
        case list():
            return [on_device(value, device) for value in inputs]
        case tuple():
            return tuple(on_device(value, device) for value in inputs)
    return inputs


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments and named arguments of a batch: a tensor is the only one, a tuple all, a dict by name."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def input_matrix(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a layer's matrix is applied to: (positions, n), n in the order of the weight's matrix.

    The groups of a convolution stand below each other: they share a matrix's width, and are looked at as one.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(-1, x.shape[-1])
    sizes = len(module.kernel_size)
    x = x if x.ndim == sizes + 2 else x[None]
    x = _padded(module, x)
    for at in range(sizes):
        kernel, step, dilation = module.kernel_size[at], module.stride[at], module.dilation[at]
        span = dilation * (kernel - 1) + 1
        x = x.unfold(2 + at, span, step)[..., ::dilation]
    # Now x has batch, channels, positions and kernel, each of the last two in as many sizes.
    batch, channels = x.shape[:2]
    x = x.reshape(batch, module.groups, channels // module.groups, *x.shape[2:])
    order = [0, 1, *range(3, 3 + sizes), 2, *range(3 + sizes, 3 + 2 * sizes)]
    return x.permute(order).reshape(-1, channels // module.groups * math.prod(module.kernel_size))


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """Return as many rows of ``input_matrix`` as say what all of a batch do, in float32: the same ones every time.

    Neighbouring patches of an image have most of their values in common. They are taken out a few images at a time,
    because all of them together are many times the input.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _some(input_matrix(module, x), _ROWS).float()
    pieces = torch.split(x, max(1, -(-len(x) // 8)))
    return torch.cat([_some(input_matrix(module, piece), _ROWS // len(pieces)).float() for piece in pieces])


def output_rows_of(module: nn.Module, y: Tensor) -> Tensor:
    """Return the rows (positions, out) of an output, or of what has its shape, that belong to those of ``rows_of``.

    Of a convolution with one group.
    """
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _some(y.reshape(-1, y.shape[-1]), _ROWS).float()
    pieces = torch.split(y.movedim(1, -1), max(1, -(-len(y) // 8)))
    return torch.cat([_some(piece.reshape(-1, piece.shape[-1]), _ROWS // len(pieces)).float() for piece in pieces])


def _some(rows: Tensor, most: int) -> Tensor:
    if len(rows) <= most:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]
    return rows[chosen.to(rows.device)]


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    # The module keeps what padding means, "same" included, as the amounts that F.pad takes.
    amounts = module._reversed_padding_repeated_twice
    if not any(amounts):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, list(amounts), mode=mode)
