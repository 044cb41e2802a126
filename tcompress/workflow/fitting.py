"""One layer through one format: cast up, fit, cast down, and measure what was really stored."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tcompress.checkpoint.manifest import figure
from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.errors import NumericalError
from tcompress.formats import Format
from tcompress.formats.grouped import GroupFormat
from tcompress.linalg.distance import compare


@dataclass(frozen=True)
class Fitted:
    """The factors of a layer as they will lie on disk, and how far they are from the weight.

    factors: name -> CPU tensor in the stored type. relative_error: Frobenius norm of (weight - what decompression
    gives, in the weight's own type) over that of the weight (low-rank-plus-sparse paper, equation 15).
    """

    format: Format
    shape: tuple[int, ...]
    factors: Mapping[str, Tensor]
    norm: float
    relative_error: float
    seconds: float

    @property
    def stored_bytes(self) -> int:
        """Bytes of all factors in their cheapest encodings."""
        return sum(cheapest_bytes(spec) for spec in self.specs().values())

    def specs(self) -> dict[str, FactorSpec]:
        """Return shape and nonzeros of each factor; factors that the format holds sparse have nonzeros."""
        planned = self.format.factor_specs(self.shape, next(iter(self.factors.values())).dtype)
        return {
            name: FactorSpec(
                tuple(factor.shape), factor.dtype, None if planned[name].nonzeros is None else nonzeros(factor)
            )
            for name, factor in self.factors.items()
        }


def working_copy(weight: Tensor, device: torch.device) -> Tensor:
    """Return a weight in the precision of the computation: float32, or float64 for float64 weights."""
    return weight.to(device=device, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def nonzeros(factor: Tensor) -> int:
    """Count the values whose bits are not all zero: those that a sparse encoding stores."""
    wide = {2: torch.int16, 4: torch.int32, 8: torch.int64}[factor.dtype.itemsize]
    return int(torch.count_nonzero(factor.contiguous().view(wide)))


def fit(weight: Tensor, setting: Format, *, store: torch.dtype, device: torch.device) -> Fitted:
    """Fit one format to a weight (any floating type, CPU) and store its factors as ``store``.

    Raises NumericalError when a factor is not finite in the stored type.
    """
    started = time.perf_counter()
    factors = _stored(setting.fit(working_copy(weight, device)).state_dict(), setting, store)
    return _measured(weight, setting, factors, device, started)


def fit_several(
    weight: Tensor, settings: Sequence[Format], *, store: torch.dtype, device: torch.device
) -> Iterator[Fitted]:
    """Fit several settings of one format, in their order, sharing what the format can share. Raises as ``fit``."""
    started = time.perf_counter()
    swept = type(settings[0]).sweep(working_copy(weight, device), settings)
    for setting, factorization in zip(settings, swept, strict=True):
        factors = _stored(factorization.state_dict(), setting, store)
        yield _measured(weight, setting, factors, device, started)
        started = time.perf_counter()


def fit_group(
    weights: Sequence[Tensor], setting: GroupFormat, *, store: torch.dtype, device: torch.device
) -> tuple[dict[str, Tensor], list[Fitted]]:
    """Fit one format to several weights: the shared factors, and what is each weight's own with its error.

    Raises as ``fit``.
    """
    started = time.perf_counter()
    shared, own = setting.fit_together([working_copy(weight, device) for weight in weights])
    stored = _stored(shared, setting, store)
    fitted = []
    for weight, factors in zip(weights, own, strict=True):
        each = _stored(factors, setting, store)
        measured = _measured(weight, setting, {**stored, **each}, device, started)
        fitted.append(replace(measured, factors=each))
        started = time.perf_counter()
    return stored, fitted


def _stored(found: Mapping[str, Tensor], setting: Format, store: torch.dtype) -> dict[str, Tensor]:
    factors = {name: factor.detach().to(store).cpu() for name, factor in found.items()}
    if not all(bool(torch.isfinite(factor).all()) for factor in factors.values()):
        raise NumericalError(f"{setting}: a factor is not finite as {str(store).removeprefix('torch.')}")
    return factors


def _measured(
    weight: Tensor, setting: Format, factors: dict[str, Tensor], device: torch.device, started: float
) -> Fitted:
    shape = tuple(weight.shape)
    rebuilt = rebuild(setting, shape, factors, dtype=weight.dtype, device=device)
    norm, error = compare(weight, rebuilt)
    if not math.isfinite(error):
        raise NumericalError(f"{setting}: its reconstruction is not finite")
    return Fitted(setting, shape, factors, figure(norm), figure(error), time.perf_counter() - started)


def rebuild(
    setting: Format,
    shape: tuple[int, ...],
    factors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the dense weight that stored factors give, as a CPU tensor of ``dtype``: what decompression writes.

    Raises FormatError when the factors do not make the shape.
    """
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    working = {name: factor.to(device=device, dtype=precision) for name, factor in factors.items()}
    with torch.no_grad():
        return setting.load(shape, working).reconstruct().detach().to(dtype).cpu()
