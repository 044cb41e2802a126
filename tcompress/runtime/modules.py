"""FactorizedLinear, FactorizedConv and FactorizedEmbedding: called like the layers that they replace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.formats import Format
from tcompress.formats.base import CONV, Factorization
from tcompress.formats.staged import PreparedStages
from tcompress.runtime.packed import PackedFactorization
from tcompress.runtime.ways import (
    Kept,
    can_prepare,
    check_cache,
    dense_weight,
    is_ever_preferred,
    prefers_factors,
    prepare,
)


@dataclass(frozen=True)
class Origin:
    """Where a layer's factors come from, carried along so that they can be written again.

    kind: linear, conv or embedding. stored_as: type of the dense weight in the file. norm, relative_error: as in the
    manifest. fingerprint: of the stored parts, to see whether they were changed. group: of a joint format.
    source: what the file says of the checkpoint that it was made from. repaired: tensors of the model that it says were
    repaired, and are no layer's factors.
    """

    kind: str
    stored_as: torch.dtype
    norm: float
    relative_error: float | None
    fingerprint: str
    group: str | None = None
    source: tuple[tuple[str, Any], ...] = ()
    repaired: tuple[str, ...] = ()


class Factorized(nn.Module):
    """A layer whose weight is a factorization.

    factors: the factorization, whose parameters train as a weight does. setting: the format.
    cache: ``auto`` runs through the factors or with the dense weight, kept after its first use, whichever is faster for
    what comes in; ``always`` keeps the dense weight; ``never`` keeps nothing but the factors as they are stored. While
    gradients of the factors are recorded nothing is kept.
    """

    factors: Factorization
    bias: nn.Parameter | None
    like: Tensor  # empty; of the type and on the device that the layer computes in

    def __init__(
        self,
        factors: Factorization,
        setting: Format,
        *,
        like: Tensor,
        cache: str = "auto",
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        check_cache(cache)
        self.factors, self.setting, self.cache, self.origin = factors, setting, cache, origin
        self.register_buffer("like", torch.empty(0, dtype=like.dtype, device=like.device), persistent=False)
        self._kept = Kept()

    @property
    def weight(self) -> Tensor:
        """The dense weight, multiplied out: with gradients where they are recorded."""
        if self._trains():
            return dense_weight(self.factors, self.like.dtype, self._stored_as)
        self._kept.renew(self.factors)
        return self._dense()

    def hold(self, factors: Factorization) -> None:
        """Take other factors of the same shape in the place of these."""
        self.factors, self._kept = factors, Kept()

    def train(self, mode: bool = True) -> Self:
        self._kept.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> Self:
        self._kept.drop()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        self._kept.drop()
        super()._load_from_state_dict(*arguments, **options)

    @property
    def _stored_as(self) -> torch.dtype:
        return self.like.dtype if self.origin is None else self.origin.stored_as

    def _trains(self) -> bool:
        """Tell whether gradients of the factors are recorded, after which they change: then nothing is kept."""
        trains = torch.is_grad_enabled() and any(factor.requires_grad for factor in self.factors.parameters())
        if trains and self._kept.is_full():  # a compiler does not see the change itself
            self._kept.drop()
        return trains

    def _dense(self) -> Tensor:
        """Return the dense weight without gradients, kept unless nothing is to be; what is kept was renewed."""
        kept = self._kept
        if kept.dense is not None:
            return kept.dense
        with self._aside():
            dense = dense_weight(self.factors, self.like.dtype, self._stored_as)
        if self.cache != "never":
            kept.dense = dense
        return dense

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Compute what is kept: not as inference tensors, which no later step with gradients could use."""
        tensors = chain(self.factors.parameters(), self.factors.buffers())
        only_that = not torch.compiler.is_compiling() and any(tensor.is_inference() for tensor in tensors)
        with torch.inference_mode(only_that), torch.no_grad():
            yield

    def _prepare(self, geometry: dict[str, Any]) -> None:
        """Keep the prepared factorization, if there are inputs for which it is the faster way."""
        kept = self._kept
        with self._aside():
            prepared = prepare(self.factors, self.setting, self.like.dtype)
        kept.can_compile = prepared.can_compile()
        kept.only_dense = not is_ever_preferred(prepared, geometry, self.like.device.type)
        kept.prepared = None if kept.only_dense else prepared

    def _by_factors(self, operation: str, x: Tensor, **geometry: Any) -> Tensor:
        """Run through the factors as they are."""
        if isinstance(self.factors, PackedFactorization):
            return self.factors.run(operation, self.like.dtype, x, **geometry)
        result: Tensor = self.factors(operation, x, **geometry)
        return result

    def _way(self, n: int, **geometry: Any) -> Factorization | Tensor:
        """Return what serves n positions: a prepared factorization, or the dense weight."""
        kept = self._kept
        kept.renew(self.factors)
        if self.cache == "auto" and not kept.only_dense and (kept.can_compile or not torch.compiler.is_compiling()):
            if kept.prepared is None and can_prepare(self.factors, self.like.dtype):
                self._prepare(geometry)
            prepared = kept.prepared
            if prepared is not None and prefers_factors(prepared, n, geometry, kept, self.like.device.type):
                return prepared
        return self._dense()

    def extra_repr(self) -> str:
        sizes = "x".join(map(str, self.factors.shape))
        return f"{sizes}, {self.setting}, bias={self.bias is not None}, cache={self.cache}"


def added(y: Tensor, bias: Tensor) -> Tensor:
    """Return y + bias; in the memory of y, which a layer has just made, where no gradient needs it as it was."""
    return y + bias if torch.is_grad_enabled() else y.add_(bias)


class FactorizedLinear(Factorized):
    """Maps (..., in) to (..., out), as nn.Linear."""

    def __init__(self, factors: Factorization, setting: Format, *, bias: nn.Parameter | None, **rest: Any) -> None:
        super().__init__(factors, setting, **rest)
        self.out_features, self.in_features = factors.shape
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.cache == "never" or self._trains():
            return self._with_bias(self._by_factors("linear", x))
        way = self._way(math.prod(x.shape[:-1]))
        if isinstance(way, PreparedStages):
            return way.linear(x, self.bias)
        return F.linear(x, way, self.bias) if isinstance(way, Tensor) else self._with_bias(way.linear(x))

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else added(y, self.bias.to(y.dtype))


class FactorizedConv(Factorized):
    """Convolves (batch, in, *sizes) or (in, *sizes), in one to three dimensions, as nn.Conv1d to nn.Conv3d."""

    def __init__(self, factors: Factorization, setting: Format, *, layer: Any, **rest: Any) -> None:
        super().__init__(factors, setting, **rest)
        for name in ("in_channels", "out_channels", "kernel_size", "dilation", "groups"):
            setattr(self, name, getattr(layer, name))
        self.stride: tuple[int, ...] = layer.stride
        self.padding: tuple[int, ...] | str = layer.padding
        self.padding_mode = layer.padding_mode
        self._reversed_padding_repeated_twice = list(layer._reversed_padding_repeated_twice)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        dimensions = len(self.factors.shape) - 2
        if x.ndim == dimensions + 1:
            return self.forward(x[None])[0]
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), (0,) * dimensions
        geometry = {"stride": self.stride, "padding": padding, "dilation": self.dilation, "groups": self.groups}
        if self.cache == "never" or self._trains():
            return self._with_bias(self._by_factors("conv", x, **geometry))
        way = self._way(self._positions(x), **geometry)
        if isinstance(way, Tensor):
            return CONV[len(self.factors.shape)](x, way, self.bias, **geometry)
        if isinstance(way, PreparedStages):
            return way.conv(x, self.bias, **geometry)
        return self._with_bias(way.conv(x, **geometry))

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else added(y, self.bias.to(y.dtype).reshape(-1, *[1] * (y.ndim - 2)))

    def _positions(self, x: Tensor) -> int:
        """Output positions, near enough: what padding adds the kernel takes away."""
        return x.shape[0] * math.prod(
            [max(1, size // step) for size, step in zip(x.shape[2:], self.stride, strict=True)]
        )


class FactorizedEmbedding(Factorized):
    """Looks up rows for integer ids of any shape, as nn.Embedding: (*ids.shape, width)."""

    def __init__(self, factors: Factorization, setting: Format, *, padding_idx: int | None, **rest: Any) -> None:
        super().__init__(factors, setting, **rest)
        self.num_embeddings, self.embedding_dim = factors.shape
        self.padding_idx = padding_idx
        self.register_parameter("bias", None)

    def forward(self, ids: Tensor) -> Tensor:
        # A row of a table that is at hand is copied; through factors it is computed, which is never sooner.
        if self.cache != "never" and not self._trains():
            self._kept.renew(self.factors)
            return F.embedding(ids, self._dense())
        rows = self._by_factors("embedding", ids).to(self.like.dtype)
        if self.padding_idx is not None and self._trains():  # that row is not to learn
            rows = torch.where((ids == self.padding_idx)[..., None], rows.detach(), rows)
        return rows
