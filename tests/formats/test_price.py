"""Ranks chosen by a price: the closed form against all ranks tried, and sums of terms that alternate."""

from __future__ import annotations

import itertools

import pytest
import torch

from tcompress.formats import FORMATS
from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.svd import SVD
from tcompress.linalg.svd import rank_at_price

PRICES = [1e-4, 1e-2, 0.05, 0.2, 1.0, 100.0]


def weight_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def paid(weight, factors, price):
    lost = float((weight.double() - factors.reconstruct().detach().double()).square().sum())
    return lost + price * sum(each.numel() for each in factors.parameters())


@pytest.mark.parametrize("price", PRICES)
@pytest.mark.parametrize(
    ("setting", "shape"),
    [(SVD(rank=3), (14, 9)), (SVD(rank=3), (8, 5, 3, 3)), (SVD(rank=3, matricisation="spatial"), (8, 5, 3, 3))],
    ids=["matrix", "channel", "spatial"],
)
def test_the_rank_is_the_best_of_all_ranks(setting, shape, price):
    weight = weight_of(*shape)
    found = setting.fit_at_price(weight, price)
    most = min(setting.sizes(shape))
    every = [type(setting)(rank=r, matricisation=setting.matricisation) for r in range(1, most + 1)]
    costs = [paid(weight, each.fit(weight), price) for each in every]
    best = every[costs.index(min(costs))]
    assert setting.sized_as(found) == best
    assert torch.equal(found.reconstruct(), best.fit(weight).reconstruct())


def test_the_rule_is_the_brute_force_of_the_penalised_problem_zero_included():
    values = torch.tensor([5.0, 2.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    for price in (0.0, 0.01, 0.0625, 0.5, 1.0, 3.0, 24.0, 26.0):
        costs = [price * r + float(values[r:].square().sum()) for r in range(len(values) + 1)]
        assert costs[rank_at_price(values, price)] == pytest.approx(min(costs), abs=1e-12)


def test_a_price_that_nothing_is_worth_leaves_rank_one():
    assert SVD(rank=4).sized_as(SVD(rank=4).fit_at_price(weight_of(6, 5), 1e9)) == SVD(rank=1)
    setting = ReshapedSum(rank=2)
    weight = weight_of(12, 10)
    found = setting.fit_at_price(weight, 1e9)
    chosen = setting.sized_as(found)
    assert sorted(chosen.ranks) == [0, 1]
    other = ReshapedSum(ranks=chosen.ranks[::-1]).fit(weight)
    assert paid(weight, found, 1e9) <= paid(weight, other, 1e9)


@pytest.mark.parametrize("price", [0.02, 0.2])
@pytest.mark.parametrize("shape", [(24, 20), (12, 8, 3, 3)])
def test_alternation_over_the_terms_never_loses(shape, price):
    weight = weight_of(*shape)
    setting = ReshapedSum(rank=1)
    prices = [price * cost for cost in setting._costs(shape)]
    parts = [torch.zeros_like(weight) for _ in prices]
    sums = [float(weight.square().sum())]
    for _ in range(6):
        found, paid_now = setting._sweep_at(weight, prices, parts)
        ranks = [0 if term is None else next(term.parameters()).shape[-1] for term in found]
        lost = float((weight - sum(parts)).square().sum())
        sums.append(lost + sum(rank * each for rank, each in zip(ranks, prices, strict=True)))
        assert paid_now == pytest.approx(sums[-1], rel=1e-4)
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(sums))
    found = setting.fit_at_price(weight, price)
    assert paid(weight, found, price) <= sums[1] * (1 + 1e-5)
    assert {str(at) for at, rank in enumerate(setting.sized_as(found).ranks) if rank} == set(found.terms)


@pytest.mark.parametrize("price", [0.02, 0.2, 1.0])
def test_one_term_is_plain(price):
    for shape, names, plain in (
        ((24, 20), ("channel",), SVD(rank=1)),
        ((12, 8, 3, 3), ("spatial",), SVD(rank=1, matricisation="spatial")),
    ):
        weight = weight_of(*shape)
        found = ReshapedSum(rank=1, reshapes=names).fit_at_price(weight, price)
        assert torch.equal(found.reconstruct(), plain.fit_at_price(weight, price).reconstruct())


@pytest.mark.parametrize("price", [0.2, 1.0])
def test_two_terms_cost_no_more_than_either_alone(price):
    shape = (32, 24, 3, 3)
    weight = SVD(rank=2).fit(weight_of(*shape)).reconstruct().detach()
    weight = weight + SVD(rank=2, matricisation="spatial").fit(weight_of(*shape, seed=1)).reconstruct().detach()
    found = ReshapedSum(rank=1).fit_at_price(weight, price)
    alone = [
        paid(weight, ReshapedSum(rank=1, reshapes=(name,)).fit_at_price(weight, price), price)
        for name in ("channel", "spatial")
    ]
    assert paid(weight, found, price) <= min(alone)
    if price == 1.0:  # at a lower one the first term takes everything: a local optimum
        assert ReshapedSum(rank=1).sized_as(found).ranks == (2, 2)
        assert paid(weight, found, price) < 0.8 * min(alone)


def test_formats_say_whether_they_have_a_price():
    assert {name for name, each in FORMATS.items() if each.has_price} == {"svd", "reshaped-sum"}
