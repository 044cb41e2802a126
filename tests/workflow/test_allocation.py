"""One choice per layer under a budget against every choice there is, and against a solver of integer programs."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from tcompress.workflow.allocation import Point, allocate, hull, smallest_cost

few_points = st.lists(st.builds(Point, st.integers(0, 40), st.integers(0, 60).map(float)), min_size=1, max_size=6)
small_problems = st.lists(few_points, min_size=0, max_size=4)
wide_losses = st.builds(lambda digits, power: digits * 10.0**power, st.integers(0, 999), st.integers(-14, 4))
wide_points = st.lists(st.builds(Point, st.integers(0, 10**12), wide_losses), min_size=1, max_size=5)
wide_problems = st.lists(wide_points, min_size=1, max_size=4)


def choices(curves):
    """Return (cost, loss, points) of every choice."""
    return [
        (sum(p.cost for p in points), math.fsum(p.loss for p in points), points)
        for points in itertools.product(*curves)
    ]


def greedy_loss(curves, budget):
    """Return the loss after the hulls' steps in the order of their slopes, up to the first that does not fit."""
    steps, current = [], [curve[hull(curve)[0]] for curve in curves]
    for n, curve in enumerate(curves):
        for a, b in itertools.pairwise(curve[index] for index in hull(curve)):
            steps.append(((b.loss - a.loss) / (b.cost - a.cost), n, b.cost, b))
    for _, n, _, point in sorted(steps, key=lambda step: step[:3]):
        if sum(p.cost for p in current) - current[n].cost + point.cost > budget:
            break
        current[n] = point
    return math.fsum(point.loss for point in current)


def random_curves(layers, points, seed, kind="free"):
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(layers):
        sides = int(rng.integers(100, 9000))
        squares = np.sort(rng.exponential(size=points) ** 2)[::-1] * rng.uniform(0.1, 10)
        costs = np.sort(rng.integers(1, 10**9, points)) if kind == "free" else 2 * sides * np.arange(points)
        losses = np.sort(rng.exponential(size=points))[::-1] if kind == "free" else squares[::-1].cumsum()[::-1]
        curves.append([Point(int(cost), float(loss)) for cost, loss in zip(costs, losses, strict=True)])
    return curves


def between(curves, part):
    lowest = smallest_cost(curves)
    return lowest + int(part * (sum(max(point.cost for point in curve) for curve in curves) - lowest))


@given(problem=st.one_of(small_problems, wide_problems), part=st.floats(0, 1.1))
@settings(max_examples=300, deadline=None)
def test_no_choice_within_the_budget_loses_less(problem, part):
    budget = between(problem, part)
    optimum = min((loss, cost) for cost, loss, _ in choices(problem) if cost <= budget)
    found = allocate(problem, budget)
    chosen = [curve[index] for curve, index in zip(problem, found.chosen, strict=True)]
    assert found.cost == sum(point.cost for point in chosen) <= budget
    assert found.loss == math.fsum(point.loss for point in chosen) == pytest.approx(optimum[0], rel=1e-12, abs=0)
    assert found.bound <= found.loss <= greedy_loss(problem, budget) * (1 + 1e-12)


@given(problem=small_problems, part=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_of_equal_losses_the_cheaper_is_chosen(problem, part):
    budget = between(problem, part)
    found = allocate(problem, budget)
    assert (found.loss, found.cost) == min((loss, cost) for cost, loss, _ in choices(problem) if cost <= budget)


@given(problem=st.one_of(small_problems, wide_problems))
@settings(max_examples=50, deadline=None)
def test_more_budget_never_loses_more(problem):
    found = [allocate(problem, between(problem, part / 20)).loss for part in range(21)]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(found))


@given(points=few_points)
@settings(max_examples=200, deadline=None)
def test_the_hull_lies_below_all_points_and_bends_one_way(points):
    indices = hull(points)
    corners = [points[index] for index in indices]
    assert corners[0] == min(points, key=lambda p: (p.cost, p.loss))
    assert (corners[-1].loss, corners[-1].cost) == min((p.loss, p.cost) for p in points)
    slopes = [(b.loss - a.loss) / (b.cost - a.cost) for a, b in itertools.pairwise(corners)]
    assert all(slope < 0 for slope in slopes)
    assert all(after > before for before, after in itertools.pairwise(slopes))
    for slope, corner in zip(slopes, corners, strict=False):
        assert all(p.loss >= corner.loss + slope * (p.cost - corner.cost) - 1e-9 for p in points)
    assert all(points.index(points[index]) == index for index in indices)


def test_what_the_hull_hides_is_found():
    curve = [Point(0, 10.0), Point(4, 6.5), Point(10, 0.0)]
    assert hull(curve) == [0, 2]
    found = allocate([curve, [Point(0, 1.0)]], 9)
    assert (found.chosen, found.loss, found.bound) == ((1, 0), 7.5, 2.0)


@pytest.mark.parametrize("kind", ["free", "rank"])
@pytest.mark.parametrize("seed", range(3))
def test_it_agrees_with_an_integer_program(kind, seed):
    curves = random_curves(12, 25, seed, kind)
    budget = between(curves, 0.3)
    costs, losses = np.array([[(p.cost, p.loss) for p in curve] for curve in curves]).reshape(-1, 2).T
    one_each = LinearConstraint(np.kron(np.eye(12), np.ones(25)), 1, 1)
    within = LinearConstraint(costs[None] / budget, -np.inf, 1)
    program = milp(
        losses,
        constraints=[one_each, within],
        integrality=np.ones(300),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    assert allocate(curves, budget).loss == pytest.approx(program.fun, rel=1e-9)


def test_costs_linear_in_the_rank_give_one_threshold_on_all_singular_values():
    rng = np.random.default_rng(0)
    shapes = [(64, 32), (48, 48), (16, 96), (100, 20)]
    squares = [np.sort(rng.exponential(size=min(shape)) ** 3)[::-1] for shape in shapes]
    curves = [
        [Point(4 * rank * sum(shape), float(s[rank:].sum())) for rank in range(len(s) + 1)]
        for shape, s in zip(shapes, squares, strict=True)
    ]
    for threshold in np.quantile(
        np.concatenate([s / sum(h) for h, s in zip(shapes, squares, strict=True)]), [0.3, 0.8]
    ):
        ranks = tuple(int((s / sum(h) > threshold).sum()) for h, s in zip(shapes, squares, strict=True))
        budget = sum(curve[rank].cost for curve, rank in zip(curves, ranks, strict=True))
        found = allocate(curves, budget)
        assert (found.chosen, found.cost) == (ranks, budget)
        assert found.bound == pytest.approx(found.loss)


@pytest.mark.parametrize("kind", ["free", "rank"])
def test_a_large_model_takes_no_time(kind):
    curves = random_curves(200, 60, 0, kind)
    budget = between(curves, 0.3)
    start = time.process_time()
    found = allocate(curves, budget)
    assert time.process_time() - start < 2
    assert found.cost <= budget
    assert found.loss - found.bound < 1e-4 * found.loss
    assert allocate(curves, budget) == found


def test_what_does_not_fit_gives_nothing():
    curves = [[Point(5, 1.0), Point(3, 2.0)], [Point(4, 1.0)]]
    assert smallest_cost(curves) == 7
    assert allocate(curves, 6) is None
    assert allocate(curves, -(10**30)) is None
    assert allocate(curves, 7).chosen == (1, 0)
    assert allocate(curves, 10**30).chosen == (0, 0)


def test_layers_without_a_choice_and_no_layers():
    curves = [[Point(3, 0.5)], [Point(2, 0.25)]]
    assert allocate(curves, 5).loss == allocate(curves, 5).bound == 0.75
    assert allocate(curves, 4) is None
    assert allocate([], 0).chosen == ()
    assert allocate([], -1) is None


def test_losses_far_apart_and_below_zero_are_told_apart():
    curves = [
        [Point(1, 1e6), Point(10**12, -1.0)],
        [Point(1, 2e-12), Point(2, 1e-12)],
        [Point(0, 0.0), Point(9, -5e-324)],
    ]
    assert allocate(curves, 2 * 10**12).chosen == (1, 1, 1)
    assert allocate(curves, 10).chosen == (0, 1, 0)


def test_what_cannot_be_added_or_compared_is_refused():
    with pytest.raises(ValueError, match="exactly"):
        allocate([[Point(1 << 52, 0.0)]] * 2, 5)
    with pytest.raises(ValueError, match="finite"):
        allocate([[Point(1, math.inf)]], 5)
