"""What a layer loses at which bytes: candidates over formats, settings and stored types, fitted and stored for real.

A loss is the squared relative error of the layer's output, tr(E G ET) / tr(W G WT), measured on what is stored: of the
weight itself where nothing is known of its inputs. Between two settings that were fitted others are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.encodings import INT4
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import FORMATS, Format
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.sparse import Sparse
from tcompress.workflow.allocation import Point, hull
from tcompress.workflow.fitting import rebuild, stored_factors, working_copy
from tcompress.workflow.layout import planned_bytes

_AMOUNTS = (0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.08, 0.05, 0.03, 0.015)  # of a layer's elements that factors may have
_PROBES = (0.25, 0.06)  # of these, at which a format shows whether it is worth a closer look
_HOPELESS = 2.0  # times the least loss at both probes: no closer look, whatever the inputs say
_BETWEEN = 4  # settings interpolated between two that were fitted
_NOTHING = 1e-12  # of the loss: what float32 makes of an exact fit


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


def default_formats() -> list[type[Format]]:
    """Return the formats that are tried unasked: those of one layer each that are fitted in seconds."""
    return [kind for kind in FORMATS.values() if kind.quick and not issubclass(kind, GroupFormat)]


def default_types(layer: Layer) -> list[torch.dtype]:
    """Return the types that factors are tried in: codes, two bytes, the layer's own."""
    own = layer.dtype.torch
    assert own is not None, "layers are of floating types"  # noqa: S101
    half = torch.bfloat16 if own == torch.bfloat16 else torch.float16
    return list(dict.fromkeys([INT4, torch.int8, half, own]))


def curve_of(
    layer: Layer,
    weight: Tensor,
    formats: Sequence[type[Format]],
    types: Sequence[torch.dtype],
    *,
    gram: Tensor | None = None,
    device: torch.device,
) -> list[Candidate]:
    """Return the candidates of a layer, dense first. gram: second moment of its input, None where it is not known.

    A setting that cannot be fitted or stored, or saves nothing, is none.
    """
    measure = _Measure(layer, working_copy(weight, device), gram, device)
    dense = Candidate(None, None, layer.dense_bytes, 0, 0.0)
    if measure.norm == 0:
        return [dense, *measure.stored(Sparse(density=0.0), types)]
    settings = [(kind, _settings(kind, layer)) for kind in _promising(formats, layer, measure)]
    found = [dense, *(measure.stored(Sparse(density=1.0), types) if Sparse in formats else ())]
    fitted = {
        kind: [each for setting in choices.values() for each in measure.stored(setting, types)]
        for kind, choices in settings
    }
    found += [each for candidates in fitted.values() for each in candidates]
    # Only beside the lower hull can a setting in between be worth anything.
    best = {id(found[at]) for at in hull([Point(each.stored_bytes, each.loss) for each in found])}
    for kind, candidates in fitted.items():
        for store in types:
            found += _interpolated(kind, layer, store, candidates, best)
    return found


class _Measure:
    """Fits settings to one weight and measures what becomes of it in each stored type; nothing is fitted twice."""

    def __init__(self, layer: Layer, weight: Tensor, gram: Tensor | None, device: torch.device) -> None:
        self.layer, self.weight, self.device = layer, weight, device
        self.gram = None if gram is None else gram.to(device=device, dtype=weight.dtype)
        self.norm = self._square(weight)
        self._known: dict[tuple[Format, bool], dict[str, Tensor]] = {}

    def _square(self, error: Tensor) -> float:
        matrix = error.reshape(len(error), -1)
        if self.gram is None:
            return float(matrix.square().sum(dtype=torch.float64))
        moved = matrix * self.gram if self.gram.ndim == 1 else matrix @ self.gram
        return max(0.0, float((moved * matrix).sum(dtype=torch.float64)))

    def stored(self, setting: Format, types: Iterable[torch.dtype], *, plain: bool = False) -> Iterator[Candidate]:
        """Yield the setting in each type in which it can be stored and saves bytes. plain: fitted without the gram."""
        for store in types:
            try:
                stored, header = planned_bytes(self.layer, setting, store, None)
                if stored + header < self.layer.dense_bytes:
                    yield Candidate(setting, store, stored, header, self._loss(setting, store, plain))
            except (FormatError, NumericalError):
                continue

    def _loss(self, setting: Format, store: torch.dtype, plain: bool) -> float:
        key = (setting, plain or self.gram is None)
        if key not in self._known:
            found = setting.fit(self.weight, None if plain else self.gram)
            self._known[key] = {name: each.detach().cpu() for name, each in found.state_dict().items()}
        factors = stored_factors(dict(self._known[key]), setting, self.layer.shape, store)
        values = {name: factor.values for name, factor in factors.items()}
        rebuilt = rebuild(setting, self.layer.shape, values, dtype=self.weight.dtype, device=self.device)
        loss = self._square(self.weight - rebuilt.to(self.device)) / self.norm if self.norm else 0.0
        return max(loss, _NOTHING) if self.norm else 0.0


def _settings(kind: type[Format], layer: Layer) -> dict[float, Format]:
    """Return settings of a format by the part of the weight's elements that their factors have; all different."""
    found: dict[float, Format] = {}
    for amount in _AMOUNTS:
        setting = _within(kind, layer, torch.float32, math.floor(amount * 4 * layer.values))
        if setting is not None and setting not in found.values():
            found[amount] = setting
    return found


def _within(kind: type[Format], layer: Layer, store: torch.dtype, budget: int) -> Format | None:
    try:
        return kind.within(layer.shape, store, budget)
    except FormatError:
        return None


def _promising(formats: Sequence[type[Format]], layer: Layer, measure: _Measure) -> list[type[Format]]:
    """Return the formats that come near the best one at some size; each is tried at two, without the inputs."""
    losses: dict[type[Format], dict[float, float]] = {}
    for kind in formats:
        for amount in _PROBES:
            setting = _within(kind, layer, torch.float32, math.floor(amount * 4 * layer.values))
            probed = [] if setting is None else list(measure.stored(setting, [torch.float32], plain=True))
            if probed:
                losses.setdefault(kind, {})[amount] = probed[0].loss
    best: Mapping[float, float] = {
        amount: min((each[amount] for each in losses.values() if amount in each), default=math.inf)
        for amount in _PROBES
    }
    return [
        kind for kind, own in losses.items() if any(loss <= _HOPELESS * best[amount] for amount, loss in own.items())
    ]


def _interpolated(
    kind: type[Format], layer: Layer, store: torch.dtype, fitted: Sequence[Candidate], best: Container[int]
) -> Iterator[Candidate]:
    """Yield settings beside the best that were fitted; the logarithm of the loss is taken to be linear in the bytes.

    best: identities of the candidates that are worth it.
    """
    own = sorted((each for each in fitted if each.store == store), key=lambda each: each.stored_bytes)
    for low, high in pairwise(own):
        if id(low) not in best and id(high) not in best:
            continue
        gap = high.stored_bytes - low.stored_bytes
        seen: set[Any] = {low.format, high.format}
        for step in range(1, _BETWEEN + 1):
            setting = _within(kind, layer, store, low.stored_bytes + gap * step // (_BETWEEN + 1))
            if setting is None or setting in seen or high.loss >= low.loss:
                continue
            seen.add(setting)
            stored, header = planned_bytes(layer, setting, store, None)
            if low.stored_bytes < stored < high.stored_bytes and stored + header < layer.dense_bytes:
                part = (stored - low.stored_bytes) / gap
                loss = math.exp((1 - part) * math.log(low.loss) + part * math.log(high.loss))
                yield Candidate(setting, store, stored, header, loss, is_fitted=False)
