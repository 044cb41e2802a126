"""What a layer's error is worth: its inputs in the dense model, and how far the model's output moves when it is wrong.

Letters: W (out, n) = the weight as its matrix; G (n, n) = the second moment of its input; D = the squared distance of
the model's outputs from the dense model's over their squared size; r = the squared relative error of the layer's
output that caused it.

Nothing is differentiated and no labels are needed: each layer in turn is pruned hard, alone, and the model is run. D/r
is what an error of this layer costs; damage of a real size is seen as it is, and not as its slope at zero. That is an
average over the layer. Where few values make a layer, single ones matter more than it says, so that the importance of
a layer is the geometric mean of D / r and of its number of values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError
from tcompress.formats.sparse import Sparse
from tcompress.workflow.fitting import working_copy
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.tracing import Traced, Use, rows_of

_PRUNED_TO = 0.15  # of the values: an error of the size that compression makes
_ENOUGH = 256  # samples that the model is run on for each layer
_LARGEST = 1 << 12  # inputs of a layer above which only the diagonal of G is kept


def values_alone(layer: Layer) -> float:
    """Return the importance of a layer of which nothing but its size is known."""
    return math.sqrt(layer.values)


def input_moments(traced: Traced, batches: Sequence[Any], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return G of every traced layer that has a vector as input, in float64; its diagonal for very wide ones.

    A weight that is used several times has the mean of them. Raises NumericalError for inputs that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(use: Use) -> Callable[..., None]:
        def keep(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            rows = rows_of(use.module, (arguments or tuple(named.values()))[0].detach())
            wide = rows.shape[1] > _LARGEST
            found = rows.square().sum(dim=0, dtype=torch.float64) if wide else (rows.T @ rows).double()
            name = use.layer.name
            sums[name] = sums[name].add_(found) if name in sums else found
            counts[name] = counts.get(name, 0) + len(rows)

        return keep

    watched = [use for use in traced.uses if not isinstance(use.module, nn.Embedding)]
    handles = [use.module.register_forward_pre_hook(watch(use), with_kwargs=True) for use in watched]
    try:
        for batch in batches:
            traced.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, found in sums.items():
        if not bool(torch.isfinite(found).all()):
            problem = "its inputs are not finite on the calibration batches"
            raise NumericalError(problem, path=checkpoint.path, tensor=name)
    return {name: found / counts[name] for name, found in sums.items()}


def importances(
    traced: Traced,
    batches: Sequence[Any],
    layers: Sequence[Layer],
    checkpoint: Checkpoint,
    moments: Mapping[str, Tensor],
    *,
    progress: Progress = silent,
) -> dict[str, float]:
    """Return the importance of every layer; of one that the model does not use, that of its size alone.

    The model has its own weights again when this is done.
    """
    few = _first(batches)
    before = [list(_outputs(traced.run(batch))) for batch in few]
    found = {}
    for layer in steps("weighing", layers, progress):
        uses = [use for use in traced.uses if use.layer.name == layer.name]
        weight = working_copy(checkpoint.read(layer.name), traced.device)
        gram = None if layer.kind is LayerKind.EMBEDDING else moments.get(layer.name)
        gram = None if gram is None else gram.to(weight)
        damaged = Sparse(density=_PRUNED_TO).fit(weight, gram).reconstruct().detach()
        r = _squared(weight - damaged, gram) / (_squared(weight, gram) or 1.0)
        if not uses or r == 0:
            found[layer.name] = values_alone(layer)
            continue
        held = [getattr(use.module, use.attribute) for use in uses]
        kept = held[0].clone()
        with torch.no_grad():
            held[0].copy_(damaged)
        distance = _distance(before, [list(_outputs(traced.run(batch))) for batch in few])
        with torch.no_grad():
            held[0].copy_(kept)
        found[layer.name] = math.sqrt(layer.values * distance / r)
    return found


def _squared(error: Tensor, gram: Tensor | None) -> float:
    matrix = error.reshape(len(error), -1)
    moved = matrix if gram is None else matrix * gram if gram.ndim == 1 else matrix @ gram
    return max(0.0, float((moved * matrix).sum(dtype=torch.float64)))


def _first(batches: Sequence[Any]) -> list[Any]:
    """Return the first batches that have enough samples together."""
    chosen: list[Any] = []
    samples = 0
    for batch in batches:
        if samples >= _ENOUGH:
            break
        chosen.append(batch)
        samples += next((len(tensor) for tensor in _outputs(batch, floating=False) if tensor.ndim), 1)
    return chosen


def _outputs(found: Any, *, floating: bool = True) -> Iterator[Tensor]:
    """Yield the tensors in what a model gives, in their order."""
    match found:
        case Tensor():
            if found.is_floating_point() or not floating:
                yield found.detach()
        case Mapping():
            for value in found.values():
                yield from _outputs(value, floating=floating)
        case tuple() | list():
            for value in found:
                yield from _outputs(value, floating=floating)


def _distance(before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> float:
    """Return the squared distance of outputs over their squared size; infinite ones count as wrong altogether."""
    apart = size = 0.0
    for was, now in zip(before, after, strict=True):
        for one, other in zip(was, now, strict=True):
            apart += float((one - other).square().sum(dtype=torch.float64))
            size += float(one.square().sum(dtype=torch.float64))
    return min(apart / size, 1.0) if size and math.isfinite(apart) else 1.0
