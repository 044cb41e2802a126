"""What a layer multiplies on one run of the model: dense, or on the way through the factors of a setting.

A position is one column of inputs that a layer's matrix is applied to: a token, a row, a pixel of a convolution's
output. A matrix with a sparse part counts its nonzeros, a convolution with one every value: there is no sparse kernel
for it. Rows of an embedding are looked up, and count nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.formats import Format
from tcompress.formats.base import Shape
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.workflow.tracing import Traced, Use


@dataclass(frozen=True)
class Call:
    """One call of a layer. groups: of a convolution. steps: input positions for one of the output."""

    positions: int = 1
    groups: int = 1
    steps: int = 1


def calls_of(traced: Traced, batch: Any) -> dict[str, list[Call]]:
    """Return the calls of every traced layer on a batch, positions in the smallest numbers of the same proportions."""
    found: dict[str, list[Call]] = defaultdict(list)

    def watch(use: Use) -> Callable[..., None]:
        def count(module: nn.Module, _: Any, output: Tensor) -> None:
            stride: Sequence[int] = getattr(module, "stride", (1,))
            positions = output.numel() // use.layer.shape[0]
            found[use.layer.name].append(Call(positions, int(getattr(module, "groups", 1)), math.prod(stride)))

        return count

    watched = [use for use in traced.uses if use.layer.kind is not LayerKind.EMBEDDING]
    handles = [use.module.register_forward_hook(watch(use)) for use in watched]
    try:
        traced.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    common = math.gcd(*(call.positions for calls in found.values() for call in calls)) or 1
    return {
        name: [replace(call, positions=call.positions // common) for call in calls] for name, calls in found.items()
    }


def multiplications(layer: Layer, setting: Format | None, calls: Iterable[Call]) -> int:
    """Return the multiplications of a layer over its calls; setting None: of the dense layer."""
    if layer.kind is LayerKind.EMBEDDING:
        return 0
    return sum(call.positions * _per_position(layer.shape, setting, call) for call in calls)


def _per_position(shape: Shape, setting: Format | None, call: Call) -> int:
    dense = math.prod(shape)
    if setting is None:
        return dense
    nonzeros = [spec.nonzeros for spec in setting.factor_specs(shape, torch.float32).values()]
    sparse = [count for count in nonzeros if count is not None]
    if sparse and len(shape) > 2:
        return dense
    plain = setting if not sparse else _low_rank_part(setting, shape)
    through = 0 if plain is None else _through(plain, shape, call)
    return min(dense, sum(sparse) + through)


def _low_rank_part(setting: Format, shape: Shape) -> Format | None:
    return setting.low_rank_setting(shape) if isinstance(setting, LowRankSparse) else None


def _through(setting: Format, shape: Shape, call: Call) -> int:
    factors: Mapping[str, Tensor] = {
        name: torch.empty(spec.shape, device="meta")
        for name, spec in setting.factor_specs(shape, torch.float32).items()
    }
    return setting.load(shape, factors).operations(groups=call.groups, steps=call.steps)
