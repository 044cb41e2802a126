"""One layer through one format: cast up, fit, cast down, and measure what was really stored."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tcompress.checkpoint.manifest import figure
from tcompress.encodings import FactorSpec, cheapest, measured, value_type
from tcompress.errors import NumericalError
from tcompress.formats import Format
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.metric import PLAIN, Metric
from tcompress.linalg.distance import compare
from tcompress.workflow.rounding import rounded_for_output
from tcompress.workflow.stored import StoredFactor, rebuild

_FEWEST_GROUPED = 1024  # values: fewer may have a pattern n:m by chance, which no plan can foresee


@dataclass(frozen=True)
class Fitted:
    """The factors of a layer as they will lie on disk, and how far they are from the weight.

    relative_error: Frobenius norm of (weight - what decompression gives, in the weight's own type) over that of the
    weight (low-rank-plus-sparse paper, equation 15).
    """

    format: Format
    shape: tuple[int, ...]
    stored: Mapping[str, StoredFactor]
    norm: float
    relative_error: float
    seconds: float

    @property
    def factors(self) -> dict[str, Tensor]:
        """The values of each factor, as decompression finds them."""
        return {name: factor.values for name, factor in self.stored.items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all factors as they are encoded."""
        return sum(factor.nbytes for factor in self.stored.values())

    def specs(self) -> dict[str, FactorSpec]:
        """Return what is known of each factor; factors that the format holds sparse have nonzeros."""
        return {name: factor.spec for name, factor in self.stored.items()}


def working_copy(weight: Tensor, device: torch.device) -> Tensor:
    """Return a weight in the precision of the computation: float32, or float64 for float64 weights."""
    return weight.to(device=device, dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32)


def fit(
    weight: Tensor,
    setting: Format,
    *,
    store: torch.dtype,
    device: torch.device,
    target: Tensor | None = None,
    metric: Metric = PLAIN,
) -> Fitted:
    """Fit one format to a weight (any floating type, CPU) and store its factors as ``store``.

    target: what is to be approximated in the weight's place, and ``metric`` says which errors count; the error told is
    that of the weight all the same. Raises NumericalError when a factor is not finite in the stored type.
    """
    started = time.perf_counter()
    aim = working_copy(weight if target is None else target, device)
    found = metric.like(aim).fit(setting, aim)
    stored = stored_factors(found.state_dict(), setting, tuple(weight.shape), store)
    stored = rounded_for_output(stored, setting, aim, metric)
    return _measured(weight, setting, stored, device, started)


def stored_factors(
    found: dict[str, Tensor], setting: Format, shape: tuple[int, ...], store: torch.dtype
) -> dict[str, StoredFactor]:
    """Return factors as they will lie on disk, and empty ``found``. Raises as ``fit``."""
    return _stored(found, setting, setting.factor_specs(shape, store), store)


def as_fitted(
    weight: Tensor, setting: Format, found: dict[str, Tensor], *, store: torch.dtype, device: torch.device
) -> Fitted:
    """Store factors that were found already, and measure them by a weight; ``found`` is emptied. Raises as ``fit``."""
    started = time.perf_counter()
    stored = stored_factors(found, setting, tuple(weight.shape), store)
    return _measured(weight, setting, stored, device, started)


def fit_several(
    weight: Tensor, settings: Sequence[Format], *, store: torch.dtype, device: torch.device
) -> Iterator[Fitted]:
    """Fit several settings of one format, in their order, sharing what the format can share. Raises as ``fit``."""
    started = time.perf_counter()
    swept = type(settings[0]).sweep(working_copy(weight, device), settings)
    for setting, factorization in zip(settings, swept, strict=True):
        planned = setting.factor_specs(tuple(weight.shape), store)
        stored = _stored(factorization.state_dict(), setting, planned, store)
        yield _measured(weight, setting, stored, device, started)
        started = time.perf_counter()


def fit_group(
    weights: Sequence[Tensor],
    setting: GroupFormat,
    *,
    store: torch.dtype,
    device: torch.device,
    targets: Sequence[Tensor] | None = None,
    metrics: Sequence[Metric] = (),
) -> tuple[dict[str, StoredFactor], list[Fitted]]:
    """Fit one format to several weights: the shared factors, and what is each weight's own with its error.

    targets, metrics: as in ``fit``, one for each weight; without metrics all errors count alike. Raises as ``fit``.
    """
    started = time.perf_counter()
    wanted = [working_copy(weight, device) for weight in (weights if targets is None else targets)]
    seen = [metric.like(weight) for weight, metric in zip(wanted, metrics, strict=True)] if metrics else ()
    shared, own = setting.fit_together(wanted, seen)
    planned_shared, planned_own = setting.group_specs(tuple(weights[0].shape), store, len(weights))
    stored = _stored(dict(shared), setting, planned_shared, store)
    fitted = []
    for weight, factors in zip(weights, own, strict=True):
        each = _stored(dict(factors), setting, planned_own, store)
        whole = _measured(weight, setting, {**stored, **each}, device, started)
        fitted.append(replace(whole, stored=each))
        started = time.perf_counter()
    return stored, fitted


def _stored(
    found: dict[str, Tensor], setting: Format, planned: Mapping[str, FactorSpec], store: torch.dtype
) -> dict[str, StoredFactor]:
    """Encode the factors, and let go of each as found when it is done: a sparse one is as large as the weight."""
    stored = {}
    for name in list(found):
        values = found.pop(name).detach().to(value_type(store)).cpu()
        if values.dtype != store:
            values += 0.0  # codes know no -0.0, which would be stored as a value that is not zero
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(f"{setting}: a factor is not finite as {str(store).removeprefix('torch.')}")
        try:
            stored[name] = encoded(values, store, is_sparse=planned[name].nonzeros is not None)
        except NumericalError as error:
            raise NumericalError(f"{setting}: factor {name} cannot be stored: {error.reason}") from error
    return stored


def encoded(factor: Tensor, store: torch.dtype, *, is_sparse: bool) -> StoredFactor:
    """Return a CPU factor, in the ``value_type`` of its stored type, in the coding of the fewest bytes.

    Raises NumericalError where codes cannot hold it.
    """
    shape = tuple(factor.shape)
    spec = measured(factor, store) if is_sparse else FactorSpec(shape, store)
    if factor.numel() < _FEWEST_GROUPED:
        spec = replace(spec, pattern=None)
    coding = cheapest(spec)
    parts = coding.encode(factor)
    # Codes are what they decode to; everything else comes back as it was.
    return StoredFactor(spec, coding, parts, factor if coding.values is None else coding.decode(parts, shape))


def _measured(
    weight: Tensor, setting: Format, stored: dict[str, StoredFactor], device: torch.device, started: float
) -> Fitted:
    shape = tuple(weight.shape)
    factors = {name: factor.values for name, factor in stored.items()}
    rebuilt = rebuild(setting, shape, factors, dtype=weight.dtype, device=device)
    norm, error = compare(weight, rebuilt)
    if not math.isfinite(error):
        raise NumericalError(f"{setting}: its reconstruction is not finite")
    norm, error = figure(norm), figure(error)
    if not math.isfinite(norm):
        raise NumericalError(f"{setting}: the weight's norm exceeds the range of float64; scale the weight down")
    return Fitted(setting, shape, stored, norm, error, time.perf_counter() - started)
