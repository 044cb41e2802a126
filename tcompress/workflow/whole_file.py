"""A plan for a file of so many bytes: what a choice makes of the whole file, and the best choice that keeps within.

What candidates cost, factors and their description, is not all that hangs on them: the manifest has a formula for each
format that is there, offsets have more digits in larger files, headers end at a multiple of eight bytes, and a folder
may need another shard. The bytes of the whole are known for any choice, before anything is fitted, but they are no sum
over the layers, of which alone the best choice can be found. So costs are limited to what the rest of the last choice
leaves of the bytes, again and again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property

from tcompress.checkpoint import shards
from tcompress.formats import Format
from tcompress.workflow.allocation import Allocation, Choice, Point, allocate
from tcompress.workflow.choices import Choices
from tcompress.workflow.compression import layout_of, planned_contents
from tcompress.workflow.planning import Decision, weigh
from tcompress.workflow.results import describe
from tcompress.workflow.settings import Settings

_MOST_LIMITS = 24  # that are tried; two or three do
_NEAR = 1 / 512  # of the bytes: limits this close are not told apart


class WholeFile:
    """The file, or the folder of them, that ``compress`` would write of each choice.

    points: what each candidate of each layer costs in bytes, and what it loses. max_shard_bytes: as ``compress`` has
    it; raises UsageError for one that cannot be.
    """

    def __init__(self, choices: Choices, points: Sequence[Sequence[Point]], max_shard_bytes: int | None = None) -> None:
        self._choices, self._points = choices, points
        self._layout = layout_of(choices.checkpoint, max_shard_bytes)
        self._source = describe(choices.checkpoint)

    def nbytes(self, choice: Choice) -> int:
        """Return the bytes of all files of a choice, none less than those that are written."""
        choices = self._choices
        decisions = [self._decision(layer, chosen) for layer, chosen in enumerate(choice)]
        contents = planned_contents(choices.checkpoint, decisions, self._source, choices.repaired)
        return shards.planned_bytes(contents, self._layout)

    @cached_property
    def smallest(self) -> Allocation:
        """The choice of the fewest bytes: the cheapest candidates, without formats that cost more than they save."""
        left_out: set[type[Format]] = set()
        best = self._cheapest(left_out)
        while kinds := self._kinds(best):
            kind = min(kinds, key=lambda each: self.nbytes(self._cheapest({*left_out, each})))
            left_out.add(kind)
            without = self._cheapest(left_out)
            if self.nbytes(without) >= self.nbytes(best):
                break
            best = without
        chosen = [curve[at] for curve, at in zip(self._points, best, strict=True)]
        cost, loss = sum(point.cost for point in chosen), math.fsum(point.loss for point in chosen)
        least = allocate(self._points, cost)
        assert least is not None, "this choice costs no more"  # noqa: S101
        return Allocation(best, cost, loss, min(loss, least.bound))

    def best_within(self, most: int) -> Allocation | None:
        """Return the choice of the least loss found with at most ``most`` bytes; None where ``smallest`` has more."""
        best = self.smallest
        rest = self.nbytes(best.chosen) - best.cost
        if best.cost + rest > most:
            return None
        low, high = best.cost, most + 1  # limits that led to a file within, and to a larger one
        for _ in range(_MOST_LIMITS):
            limit = most - rest if low < most - rest < high else (low + high) // 2
            found = allocate(self._points, limit)
            assert found is not None, "the smallest file's choice costs no more"  # noqa: S101
            size = self.nbytes(found.chosen)
            rest = size - found.cost
            if size > most:
                high = found.cost
            else:
                low, best = limit, min(best, found, key=lambda each: each.loss)
                if most - rest <= limit:
                    break
            if high - low <= max(1, most * _NEAR):
                break
        return best

    def _decision(self, position: int, chosen: int) -> Decision:
        layer, candidate = self._choices.layers[position], self._choices.curves[position][chosen]
        if candidate.format is None:
            return Decision(layer, None, None, layer.dense_bytes)
        # A candidate knows nothing of zeros in the weight; what is written does.
        nonzeros = self._choices.facts[layer.name].nonzeros
        return weigh(layer, candidate.format, nonzeros, Settings(candidate.store))

    def _kinds(self, choice: Choice) -> list[type[Format]]:
        """Return the formats that a choice has, those of the first layers first."""
        chosen = [curve[at].format for curve, at in zip(self._choices.curves, choice, strict=True)]
        return list(dict.fromkeys(type(each) for each in chosen if each is not None))

    def _cheapest(self, left_out: Collection[type[Format]]) -> Choice:
        """Return the cheapest candidate of each layer that is in no format that is left out."""
        return tuple(
            min(
                (at for at, each in enumerate(curve) if type(each.format) not in left_out),
                key=lambda at: (points[at].cost, points[at].loss),
            )
            for curve, points in zip(self._choices.curves, self._points, strict=True)
        )
