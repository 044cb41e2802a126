"""Sequential reconstruction: fed by what is compressed before it, a layer is to give what the dense model gave.

What that means for its weight is said in ``aims``; here are the two models, and the inputs that the layer gets in each.

J. Frantar, D. Alistarh, "Optimal brain compression", 2022: least squares layer by layer.
AA-SVD, 2026: inputs from the compressed prefix, targets from the dense model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint.integrity import fingerprint
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError
from tcompress.workflow.aims import Aim, LookupAim, Products
from tcompress.workflow.samples import tensors_in
from tcompress.workflow.shortcuts import has_shortcut, meeting
from tcompress.workflow.task import Task
from tcompress.workflow.tracing import Traced, Use, calibration_inputs, load_traced, output_rows_of, rows_of

_LARGEST = 1 << 13  # inputs of a layer above which its moments, squared, are not formed


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
            "inputs": fingerprint(tensor.cpu() for batch in self.batches for tensor in tensors_in(batch)),
        }
        self._positions = {use.layer.name: at for at, use in reversed(list(enumerate(self.dense.uses)))}
        self._share = _shared_inputs(self.dense, self.batches[0])
        self._known: tuple[int, Products] | None = None
        self._meet = {
            at
            for at, use in enumerate(self.dense.uses)
            if self._share.count(self._share[at]) == 1 and has_shortcut(self.dense, use, self.batches[0])
        }

    def ordered(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return the layers in the order in which the model calls them; those that it never calls come last."""
        return sorted(layers, key=lambda layer: self._positions.get(layer.name, len(self._positions)))

    def aim(self, layer: Layer, weight: Tensor) -> Aim | None:
        """Return what the layer is to become; None for one whose input is not known, or too wide to be looked at.

        A weight that is used several times has inputs at different depths: those of the dense model stand for all. Of
        one that is an embedding and something else as well, the something else counts. Raises NumericalError for inputs
        that are not finite.
        """
        at = self._positions.get(layer.name)
        if at is None:
            return None
        uses = [use for use in self.dense.uses if use.layer.name == layer.name]
        others = [use for use in uses if not isinstance(use.module, nn.Embedding)]
        if not others:
            return LookupAim.of(weight, self._lookups(layer, uses))
        if weight[0].numel() > _LARGEST:
            return None
        products = self._products_of(at) if len(uses) == 1 else self._products_in_dense(others)
        if not products.are_finite:
            raise NumericalError(
                "its inputs are not finite on the calibration batches", path=self._path, tensor=layer.name
            )
        return products.aim(weight)

    def _lookups(self, layer: Layer, uses: Sequence[Use]) -> Tensor:
        """Return how often each row of an embedding is looked up, by all that use it."""
        counts = torch.zeros(layer.shape[0], dtype=torch.float64)
        for use in uses:
            for batch in self.batches:
                rows = _input_of(self.dense, use, batch).flatten().long().cpu()
                counts += torch.bincount(rows, minlength=len(counts))
        return counts

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

    def _products_of(self, at: int) -> Products:
        key = self._share[at]
        if self._known is None or self._known[0] != key:
            self._known = (key, self._measured(at))
        return self._known[1]

    def _products_in_dense(self, uses: Sequence[Use]) -> Products:
        products = Products()
        for use in uses:
            for batch in self.batches:
                rows = rows_of(use.module, _input_of(self.dense, use, batch))
                products.add(rows, rows)
        return products

    def _measured(self, at: int) -> Products:
        use, other = self.dense.uses[at], self.prefix.uses[at]
        products = Products()
        for batch in self.batches:
            if at not in self._meet:
                was, now = _input_of(self.dense, use, batch), _input_of(self.prefix, other, batch)
                products.add(rows_of(use.module, was), rows_of(other.module, now))
                continue
            before, after = meeting(self.dense, use, batch), meeting(self.prefix, other, batch)
            shift = output_rows_of(use.module, before.other - after.other)
            products.add(rows_of(use.module, before.input), rows_of(other.module, after.input), shift)
        return products


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
