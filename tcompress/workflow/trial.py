"""What settings do to one weight: each is fitted once, stored in every type that is asked for, and measured as stored.

A loss is the squared relative error of the layer's output, tr(E G ET) / tr(W G WT): of the weight itself where nothing
is known of its inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.encodings import value_type
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import Format
from tcompress.formats.base import Factorization
from tcompress.formats.metric import Metric
from tcompress.formats.outlook import Outlook
from tcompress.workflow.fitting import stored_factors
from tcompress.workflow.layout import planned_bytes
from tcompress.workflow.rounding import rounded_for_output
from tcompress.workflow.stored import rebuild

_NOTHING = 1e-12  # of the loss: what float32 makes of an exact fit
_ROWS_PER_COLUMN = 4  # of a very tall weight, the rows that are looked at, evenly spread
_MEASURED = 2  # settings of a format of which it is measured what codes add; of others, the same part of what is kept
_FEWEST_VALUES = 1 << 17  # of a weight, before less than all of it is looked at, and with less than all patience


@dataclass(frozen=True)
class Candidate:
    """What could become of a layer. format None: it stays dense. loss: relative, squared; is_fitted: not interpolated.

    stored_bytes: of the factors; header_bytes: what their description adds to the file.
    """

    format: Format | None
    store: torch.dtype | None
    stored_bytes: int
    header_bytes: int
    loss: float
    is_fitted: bool = True


class Trial:
    """One weight, in the precision of the computation, and what is known of its fits. metric: which errors count.

    Of a very tall weight some rows are fitted in the place of all, by formats to which that makes no difference.
    """

    def __init__(
        self,
        layer: Layer,
        weight: Tensor,
        metric: Metric,
        formats: Sequence[type[Format]],
        device: torch.device,
    ) -> None:
        self.layer, self._weight, self._device = layer, weight, device
        self._metric = metric.like(weight)
        self._is_small = weight.numel() < _FEWEST_VALUES
        self._some = weight if self._is_small or metric.rows is not None else _some_rows(weight)
        self._norms = {True: self._metric.square(self._some), False: self._metric.square(weight)}
        self.outlooks: dict[type[Format], Outlook | None] = {}
        for kind in () if self.is_zero else formats:
            with suppress(FormatError):  # it cannot be applied to this layer
                self.outlooks[kind] = kind.outlook(self._metric.seen_in(weight))
        self._fits: dict[Format, _Fit] = {}
        self._added: dict[tuple[type[Format], torch.dtype], list[float]] = {}

    @property
    def is_zero(self) -> bool:
        """Whether the layer's output is zero whatever the input."""
        return self._norms[False] == 0

    def of_format(self, settings: Sequence[Format], types: Sequence[torch.dtype]) -> Iterator[Candidate]:
        """Yield settings of one format in each type; formats that can share work between settings do."""
        if self._metric.is_plain and settings:
            patient = [setting if self._is_small else setting.quicker() for setting in settings]
            with suppress(FormatError, NumericalError):  # of which one it is, is seen when each is fitted by itself
                swept = type(settings[0]).sweep(self._looked_at(settings[0]), patient)
                self._fits |= {each: self._known(each, found) for each, found in zip(settings, swept, strict=True)}
        for setting in settings:
            yield from self.stored(setting, types)

    def stored(self, setting: Format, types: Iterable[torch.dtype]) -> Iterator[Candidate]:
        """Yield the setting in each type in which it can be stored and saves bytes."""
        for store in types:
            try:
                stored, header = planned_bytes(self.layer, setting, store, None)
                if stored + header < self.layer.dense_bytes:
                    yield Candidate(setting, store, stored, header, max(self._loss(setting, store), _NOTHING))
            except (FormatError, NumericalError):
                continue

    def _loss(self, setting: Format, store: torch.dtype) -> float:
        if self.is_zero:
            return 0.0
        if setting not in self._fits:
            self._fits[setting] = self._fitted(setting)
        fit = self._fits[setting]
        if value_type(store) == store:
            return fit.loss + _rounding(fit.factors, store)
        added = self._added.setdefault((type(setting), store), [])
        if len(added) < _MEASURED or self._is_small:
            added.append(self._coded(setting, fit, store) / max(1 - fit.loss, _NOTHING))
        return fit.loss + added[-1] * (1 - fit.loss)

    def _fitted(self, setting: Format) -> _Fit:
        patient = setting if self._is_small else setting.quicker()
        return self._known(setting, self._metric.fit(patient, self._looked_at(setting)))

    def _known(self, setting: Format, found: Factorization) -> _Fit:
        measured = self._relative(setting, found.reconstruct().detach())
        outlook = self.outlooks.get(type(setting)) if self._metric.is_plain else None
        loss = outlook.loss(setting) if outlook is not None and outlook.is_exact else measured
        return _Fit({name: each.detach().cpu() for name, each in found.state_dict().items()}, measured, loss)

    def _coded(self, setting: Format, fit: _Fit, store: torch.dtype) -> float:
        """Return what storing the factors as codes adds to the loss."""
        shape = tuple(self._looked_at(setting).shape)
        coded = stored_factors(dict(fit.factors), setting, shape, store)
        coded = rounded_for_output(coded, setting, self._looked_at(setting), self._metric)
        values = {name: factor.values for name, factor in coded.items()}
        rebuilt = rebuild(setting, shape, values, dtype=self._weight.dtype, device=self._device)
        return self._relative(setting, rebuilt.to(self._device)) - fit.measured

    def _looked_at(self, setting: Format) -> Tensor:
        return self._some if setting.by_rows else self._weight

    def _relative(self, setting: Format, rebuilt: Tensor) -> float:
        return self._metric.square(self._looked_at(setting) - rebuilt) / (self._norms[setting.by_rows] or 1.0)


@dataclass(frozen=True)
class _Fit:
    """measured: on the rows that were fitted; loss: of the whole weight, where it is known better."""

    factors: dict[str, Tensor]
    measured: float
    loss: float


def _some_rows(weight: Tensor) -> Tensor:
    rows = _ROWS_PER_COLUMN * (weight.numel() // len(weight))
    if len(weight) <= rows:
        return weight
    return weight[torch.linspace(0, len(weight) - 1, rows, dtype=torch.float64).round().long()]


def _rounding(factors: dict[str, Tensor], store: torch.dtype) -> float:
    """Return the loss by rounding to a floating type: each factor's values are off by a part of themselves.

    Raises NumericalError when a factor exceeds the range.
    """
    if not all(bool(torch.isfinite(factor.to(store)).all()) for factor in factors.values()):
        raise NumericalError("a factor is not finite in the stored type")
    return float(len(factors) * torch.finfo(store).eps ** 2 / 12)
