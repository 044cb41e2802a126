"""One choice per layer under a budget: the least loss of all of them together.

A layer offers points (a cost, a loss), of which one is chosen: the multiple-choice knapsack problem. First a multiplier
p, the price of a unit of cost: each layer takes its least loss + p cost, and sum(loss + p cost) - p budget is a bound
that no choice within the budget undercuts (H. Everett, 1963). Then what the multiplier cannot reach, the points inside
the hulls: by dynamic programming over the few candidates that the gap to the bound leaves (D. Pisinger, "A minimal
algorithm for the multiple-choice knapsack problem", 1995), which is exact unless more than _MOST_STATES partial
choices are open at a time, and then keeps the most promising of them.

Letters: w = cost, which is limited, v = loss, which is made small; slack = v + p w of a point above the least of its
layer. Sums of costs stay below 2^53, where float64 holds every whole number. Nothing here depends on the time it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_MOST_STATES = 3000  # partial choices open at a time; the optimum of small problems needs fewer
_ROUNDING = 1e-12  # of the sums: what their last digits may differ by, depending on the order of addition
_STEEPEST = 1e250  # a multiplier that can still be multiplied
_LARGEST_TOTAL = 1 << 53

Array = NDArray[np.float64]
Indices = NDArray[np.intp]
Choice = tuple[int, ...]


@dataclass(frozen=True)
class Point:
    """What a candidate costs, in bytes or operations, and what it loses (finite)."""

    cost: int
    loss: float


@dataclass(frozen=True)
class Allocation:
    """The point chosen for each layer, their sums, and a bound on the loss of any choice that costs no more.

    After ``allocate`` the bound holds for all choices within its budget.
    """

    chosen: Choice
    cost: int
    loss: float
    bound: float


def hull(points: Sequence[Point]) -> list[int]:
    """Return the indices of the lower convex hull: costs rise, losses fall strictly, and each step gains less.

    Of equal points the first stands in it; points on a line between two others do not.
    """
    layer = _Layer(*_columns(points))
    return [int(layer.index[position]) for position in layer.hull]


def smallest_cost(curves: Sequence[Sequence[Point]]) -> int:
    """Return the cost of the cheapest choice."""
    return sum(min(point.cost for point in curve) for curve in curves)


def allocate(curves: Sequence[Sequence[Point]], budget: int) -> Allocation | None:
    """Return the choice of least loss that costs at most ``budget``, the cheaper of equals; None if there is none.

    curves: of each layer the points to choose from, one at least, in any order.
    """
    _check(curves)
    found = _solve([_Layer(*_columns(curve)) for curve in curves], float(min(budget, _LARGEST_TOTAL)))
    return None if found is None else _allocation(curves, *found)


def _check(curves: Sequence[Sequence[Point]]) -> None:
    if sum(max(abs(point.cost) for point in curve) for curve in curves) >= _LARGEST_TOTAL:
        raise ValueError("costs this large cannot be added exactly")
    if not all(math.isfinite(point.loss) for curve in curves for point in curve):
        raise ValueError("a loss must be finite")


def _columns(points: Sequence[Point]) -> tuple[Array, Array]:
    return np.array([float(p.cost) for p in points]), np.array([float(p.loss) for p in points])


def _allocation(curves: Sequence[Sequence[Point]], chosen: Choice, bound: float) -> Allocation:
    points = [curve[index] for curve, index in zip(curves, chosen, strict=True)]
    loss = math.fsum(point.loss for point in points)
    return Allocation(chosen, sum(point.cost for point in points), loss, min(bound, loss))


class _Layer:
    """A layer's points that no other dominates, w rising and v falling, and which of them are on the hull."""

    def __init__(self, w: Array, v: Array) -> None:
        order = np.lexsort((np.arange(len(w)), v, w))
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(v[order])[:-1]])
        self.index = order[v[order] < best_before]
        self.w, self.v = w[self.index], v[self.index]
        self.hull, self.slopes = [0], list[float]()
        while (at := self.hull[-1]) + 1 < len(self.w):
            with np.errstate(over="ignore"):
                slopes = (self.v[at] - self.v[at + 1 :]) / (self.w[at + 1 :] - self.w[at])
            farthest = len(slopes) - 1 - int(np.argmax(slopes[::-1]))
            # Rounding must not make a later step look better than the one it builds on.
            self.slopes.append(min(float(slopes[farthest]), *self.slopes[-1:], _STEEPEST))
            self.hull.append(at + 1 + farthest)


def _total(layers: Sequence[_Layer], chosen: Sequence[int]) -> tuple[float, float]:
    """Return the sums of v and w, each rounded once."""
    pairs = list(zip(layers, chosen, strict=True))
    return math.fsum(layer.v[at] for layer, at in pairs), math.fsum(layer.w[at] for layer, at in pairs)


def _solve(layers: Sequence[_Layer], limit: float) -> tuple[Choice, float] | None:
    """Return the choice of least v with w within the limit, and the Lagrangian bound on v; None if nothing fits."""
    if _total(layers, [0] * len(layers))[1] > limit:
        return None
    at_price, price, chosen = _greedy(layers, limit)
    v, w = _total(layers, at_price)
    bound = v - price * (limit - w)
    if price:
        chosen = _swapped(layers, chosen, limit)
        known = _total(layers, chosen)[0]
        searched = _searched(layers, at_price, price, known, limit)
        chosen = min(chosen, searched, key=lambda choice: _total(layers, choice))
    return tuple(int(layer.index[at]) for layer, at in zip(layers, chosen, strict=True)), bound


def _greedy(layers: Sequence[_Layer], limit: float) -> tuple[list[int], float, list[int]]:
    """Return the choice at the multiplier of the limit, the multiplier, and the choice filled up with what still fits.

    The steps of all hulls are taken best first: the first that does not fit is where a bisection for the multiplier
    would end. It is 0 if all of them fit.
    """
    steps = [(-slope, n, step) for n, layer in enumerate(layers) for step, slope in enumerate(layer.slopes)]
    chosen, at_price, price = [0] * len(layers), [0] * len(layers), 0.0
    w = _total(layers, chosen)[1]
    for negative, n, step in sorted(steps):
        layer = layers[n]
        if chosen[n] != layer.hull[step]:
            continue  # it builds on a step that did not fit
        after = w + float(layer.w[layer.hull[step + 1]] - layer.w[chosen[n]])
        if after <= limit:
            chosen[n], w = layer.hull[step + 1], after
        elif not price:
            at_price, price = chosen.copy(), -negative
    return at_price if price else chosen, price, chosen


def _swapped(layers: Sequence[_Layer], chosen: Sequence[int], limit: float) -> list[int]:
    """Return the choice after single moves, the largest gain first, while one fits into what the limit leaves."""
    chosen = list(chosen)
    while True:
        room = limit - _total(layers, chosen)[1]
        moves = []
        for n, (layer, at) in enumerate(zip(layers, chosen, strict=True)):
            to = int(np.searchsorted(layer.w, layer.w[at] + room, side="right")) - 1
            if to > at:
                moves.append((float(layer.v[to] - layer.v[at]), n, to))
        for _, n, to in sorted(moves):
            moved = [*chosen[:n], to, *chosen[n + 1 :]]
            if _total(layers, moved)[1] <= limit:
                chosen = moved
                break
        else:
            return chosen


@dataclass
class _States:
    """Partial choices: v and w beyond the choice at the multiplier, and which point of which state before led here."""

    v: Array
    w: Array
    parent: Indices
    point: Indices

    def taken(self, which: Indices | NDArray[np.bool_]) -> _States:
        return _States(self.v[which], self.w[which], self.parent[which], self.point[which])

    def extended(self, v: Array, w: Array, points: Indices) -> _States:
        """Return every state with every one of a layer's points."""
        parent, point = np.repeat(np.arange(len(self.v)), len(points)), np.tile(points, len(self.v))
        return _States(self.v[parent] + v[point], self.w[parent] + w[point], parent, point)

    def undominated(self) -> _States:
        """Return the states, w rising, that none of less w undercuts in v."""
        ordered = self.taken(np.lexsort((self.v, self.w)))
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(ordered.v)])[:-1]
        return ordered.taken(ordered.v < best_before)

    def most_promising(self, price: float, best: int) -> _States:
        """Return _MOST_STATES of least slack, in their order, with the best one among them."""
        slack = self.v + price * self.w
        slack[best] = -np.inf
        return self.taken(np.sort(np.argsort(slack, kind="stable")[:_MOST_STATES]))

    def best_within(self, room: float) -> int:
        """Return the place of the least v, given states without dominated ones; -1 if none is within."""
        return int(np.searchsorted(self.w, room, side="right")) - 1


def _searched(layers: Sequence[_Layer], start: Sequence[int], price: float, known: float, limit: float) -> list[int]:
    """Return the best choice that dynamic programming finds, beginning at the choice at the multiplier.

    known: v of the best choice known. A partial choice whose slack exceeds its distance to the bound cannot undercut
    it. The layers yet to come stand where they started: every partial choice is a whole one, and a better one narrows
    the gap for all that follow.
    """
    v, w = _total(layers, start)
    room, best = limit - w, known - v
    allowed = price * room + _ROUNDING * (abs(v) + abs(known) + price * (abs(w) + abs(limit)))
    beyond = [(layer.v - layer.v[at], layer.w - layer.w[at]) for layer, at in zip(layers, start, strict=True)]
    slacks = [dv + price * dw for dv, dw in beyond]
    for slack, at in zip(slacks, start, strict=True):
        slack[at] = 0  # the least, but for rounding
    points = [np.flatnonzero(slack <= best + allowed) for slack in slacks]
    # Layers whose alternatives cost least come first: they find good choices while the partial ones are few.
    order = sorted((n for n in range(len(layers)) if len(points[n]) > 1), key=lambda n: np.sort(slacks[n])[1])
    savings = np.cumsum([0.0, *(beyond[n][1][points[n]].min() for n in reversed(order))])[::-1]
    states = _States(np.zeros(1), np.zeros(1), np.zeros(1, np.intp), np.zeros(1, np.intp))
    stages, found = [states], (0.0, 0.0, 0, 0)  # v, w, stage, place
    for stage, n in enumerate(order, start=1):
        states = states.extended(*beyond[n], points[n])
        best = min(best, float(states.v.min(where=states.w <= room, initial=math.inf)))
        promising = states.v + price * states.w <= best + allowed
        states = states.taken(promising & (states.w + savings[stage] <= room)).undominated()
        at = states.best_within(room)
        if len(states.v) > _MOST_STATES:
            states = states.most_promising(price, at)
            at = states.best_within(room)
        stages.append(states)
        if at >= 0:
            found = min(found, (float(states.v[at]), float(states.w[at]), stage, at))
        if not len(states.v):
            break
    return _traced(stages, order, start, found[2:])


def _traced(stages: Sequence[_States], order: Sequence[int], start: Sequence[int], found: tuple[int, int]) -> list[int]:
    """Return the choice that ends in the state found, at its stage and place."""
    chosen = list(start)
    stage, place = found
    for before in range(stage, 0, -1):
        chosen[order[before - 1]] = int(stages[before].point[place])
        place = int(stages[before].parent[place])
    return chosen
