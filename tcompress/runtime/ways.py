"""Which way an input takes through a layer: through the factors, or the dense weight that was multiplied out once."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tcompress.errors import UsageError
from tcompress.formats import Format
from tcompress.formats.base import Factorization
from tcompress.formats.effort import dense_effort
from tcompress.runtime.packed import in_type, is_in_type, weight_of

CACHES = ("auto", "always", "never")
_MARGIN = 0.8  # the way through the factors is taken when it should need this part of the dense time, or less
_BOUNDS = (2, 4, 8, 16, 32, 64, 128, 256, 1024)  # of the positions, between which the choice is made anew


@dataclass
class Kept:
    """What a layer keeps beside its factors, and of which state of them; copies and pickles of it are empty."""

    state: list[tuple[int, int]] | None = None
    dense: Tensor | None = None
    prepared: Factorization | None = None
    can_compile: bool = True
    only_dense: bool = False  # the factors are the faster way for no input
    choices: dict[tuple[int, bool], bool] = field(default_factory=dict)
    holders: list[Mapping[str, Tensor | None]] = field(default_factory=list)  # of all tensors of the factors

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def is_full(self) -> bool:
        """Tell whether anything is kept."""
        return self.dense is not None or self.prepared is not None

    def drop(self) -> None:
        """Forget everything."""
        self.state = self.dense = self.prepared = None
        self.can_compile, self.only_dense = True, False
        self.choices.clear()

    def renew(self, factors: Factorization) -> None:
        """Forget everything that another state of the factors gave."""
        if torch.compiler.is_compiling():  # tensors have no versions there; train() and every training step drop it
            return
        if not self.holders:  # going through the modules takes longer than the product of a small layer
            self.holders = [held for each in factors.modules() for held in (each._parameters, each._buffers) if held]
        state = [_state_of(tensor) for held in self.holders for tensor in held.values() if tensor is not None]
        if state != self.state:
            self.drop()
            self.state = state


def check_cache(cache: str) -> None:
    """Raise UsageError for a cache that there is not."""
    if cache not in CACHES:
        raise UsageError(f"cache is one of {', '.join(CACHES)}, got {cache!r}")


def dense_weight(factors: Factorization, dtype: torch.dtype, stored_as: torch.dtype) -> Tensor:
    """Return the dense weight in the layer's type: exactly what decompression gives, cast from ``stored_as``."""
    wide = torch.float64 if stored_as == torch.float64 else torch.float32
    with _exactly(factors):
        weight = weight_of(factors, wide).to(stored_as).to(dtype)
    # With the strides that a tensor from a file has: kernels are chosen by them, and sum in another order.
    return weight.contiguous().reshape(-1).view(weight.shape)


def prefers_factors(prepared: Factorization, n: int, geometry: Mapping[str, Any], kept: Kept, device: str) -> bool:
    """Tell whether n positions are served sooner by the factors than by a dense weight that is at hand."""
    if device == "meta":  # where nothing takes any time
        return False
    # A compiler knows n by comparisons alone.
    place = sum([n >= bound for bound in _BOUNDS]) if torch.compiler.is_compiling() else bisect_right(_BOUNDS, n)
    key = (place, torch.is_autocast_enabled(device))
    if key not in kept.choices:
        count = (1, *_BOUNDS)[place]
        stride = geometry.get("stride", (1,))
        groups, steps = int(geometry.get("groups", 1)), math.prod(stride)
        through = prepared.effort(count, groups=groups, steps=steps)
        kept.choices[key] = through <= _MARGIN * dense_effort(math.prod(prepared.shape), count)
    return kept.choices[key]


def is_ever_preferred(prepared: Factorization, geometry: Mapping[str, Any], device: str) -> bool:
    """Tell whether there are numbers of positions that are served sooner by the factors, autocast aside."""
    if device == "meta":
        return False
    with torch.autocast(device, enabled=False):
        return any(prefers_factors(prepared, n, geometry, Kept(), device) for n in (1, *_BOUNDS))


def prepare(factors: Factorization, setting: Format, dtype: torch.dtype) -> Factorization:
    """Return the factorization ready for many inputs, in the layer's type."""
    with _exactly(factors):
        return in_type(factors, setting, dtype).prepared()


def _exactly(factors: Factorization) -> AbstractContextManager[Any]:
    """Return the context without autocast: what is kept also serves inputs that come without it."""
    device = next(chain(factors.parameters(), factors.buffers())).device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def can_prepare(factors: Factorization, dtype: torch.dtype) -> bool:
    """Tell whether factors can be made ready here: a compiler does not know how to make factors of another type."""
    return not torch.compiler.is_compiling() or is_in_type(factors, dtype)


def _state_of(tensor: Tensor) -> tuple[int, int]:
    # Inference tensors count no versions; they cannot be changed outside of inference mode either.
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
