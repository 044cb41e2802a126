"""Which settings of a layer can be worth a fit: what each will lose, against what others of its size reach.

What is known comes from one decomposition for each unfolding (``Format.outlook``); nothing is fitted here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import torch

from tcompress.checkpoint.layers import Layer
from tcompress.errors import FormatError
from tcompress.formats import Format
from tcompress.formats.base import Shape
from tcompress.formats.outlook import Outlook
from tcompress.workflow.rank_multiples import rounded

_HARDLY = 0.75  # of a layer lost: where so little is left, what others do is known well enough
_STEPS = 13  # sizes at which it is known what is reached: from all of the weight's elements down, ...
_STEP = 0.65  # ... each this part of the one before


class Prospects:
    """slack: a setting is worth a fit up to so many times what others are known to reach."""

    def __init__(
        self,
        layer: Layer,
        outlooks: Mapping[type[Format], Outlook | None],
        types: Sequence[torch.dtype],
        slack: float,
    ) -> None:
        self._layer, self._outlooks, self._types, self._slack = layer, outlooks, types, slack
        self._reached = {store: self._frontier(store) for store in types}

    def worth(self, kind: type[Format], amounts: Sequence[float], rank_multiple: int = 1) -> Iterator[Format]:
        """Yield the settings with these parts of the weight's elements that may be worth a fit, all different.

        An amount is one of bytes, of what the weight takes in float32.
        """
        seen: set[Format] = set()
        for amount in amounts if kind in self._outlooks else ():
            setting = of_amount(kind, self._layer, amount)
            setting = None if setting is None else rounded(setting, rank_multiple)
            if setting is not None and setting not in seen and self._is_open(kind, setting):
                seen.add(setting)
                yield setting

    def _is_open(self, kind: type[Format], setting: Format) -> bool:
        outlook, shape = self._outlooks[kind], self._layer.shape
        reached = {store: _at(self._reached[store], _bytes_of(setting, shape, store)) for store in self._types}
        if outlook is None:
            return not _HARDLY < min(reached.values()) < math.inf
        loss = outlook.loss(setting)
        # What is exact is among what is reached, and must not be behind itself.
        slack = max(self._slack, 1.0) if outlook.is_exact else self._slack
        return any(loss <= slack * other for other in reached.values())

    def _frontier(self, store: torch.dtype) -> list[tuple[int, float]]:
        """Return bytes, rising, and the least loss that is known to be reached with so many."""
        points = []
        for kind, outlook in self._outlooks.items():
            for step in range(_STEPS if outlook is not None and outlook.is_exact else 0):
                setting = of_amount(kind, self._layer, _STEP**step)
                if setting is not None and outlook is not None:
                    points.append((_bytes_of(setting, self._layer.shape, store), outlook.loss(setting)))
        best, lowest = [], math.inf
        for nbytes, loss in sorted(points):
            if loss < lowest:
                lowest = loss
                best.append((nbytes, loss))
        return best


def _at(frontier: Sequence[tuple[int, float]], nbytes: int) -> float:
    """Return what is reached with so many bytes: between two points the loss is taken to be linear in them."""
    after = bisect_right(frontier, nbytes, key=lambda point: point[0])
    if after == 0:
        return math.inf
    if after == len(frontier):
        return frontier[-1][1]
    (low, more), (high, less) = frontier[after - 1], frontier[after]
    return more + (less - more) * (nbytes - low) / (high - low)


def of_amount(kind: type[Format], layer: Layer, amount: float) -> Format | None:
    """Return the richest setting within this part of the weight's elements, in float32; None where there is none."""
    return within(kind, layer.shape, torch.float32, math.floor(amount * 4 * layer.values))


@lru_cache(maxsize=4096)  # layers of one shape are many
def within(kind: type[Format], shape: Shape, store: torch.dtype, budget: int) -> Format | None:
    """Return the richest setting of a format within so many bytes; None where there is none."""
    try:
        return kind.within(shape, store, budget)
    except FormatError:
        return None


@lru_cache(maxsize=4096)
def _bytes_of(setting: Format, shape: Shape, store: torch.dtype) -> int:
    return setting.stored_bytes(shape, store)
