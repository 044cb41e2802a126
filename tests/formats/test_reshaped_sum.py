"""reshaped-sum against independent truth."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.svd import SVD
from tcompress.formats.ttm import TTMatrix


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lost(weight, setting):
    found = setting.fit(weight).reconstruct().detach()
    return float((found.double() - weight.double()).norm() / weight.double().norm())


def channel_part(shape, rank, seed):
    return SVD(rank=rank).fit(tensor_of(*shape, seed=seed)).reconstruct().detach()


def spatial_part(shape, rank, seed):
    return SVD(rank=rank, matricisation="spatial").fit(tensor_of(*shape, seed=seed)).reconstruct().detach()


def paired_part(shape, rank, seed):
    return TTMatrix(rank=rank).fit(tensor_of(*shape, seed=seed)).reconstruct().detach()


@pytest.mark.parametrize(
    ("plain", "setting", "shape"),
    [
        (SVD(rank=5), ReshapedSum(rank=5, reshapes=("channel",)), (24, 20)),
        (SVD(rank=5), ReshapedSum(ranks=(5, 0)), (16, 8, 3, 3)),
        (SVD(rank=5, matricisation="spatial"), ReshapedSum(ranks=(0, 5)), (16, 8, 3, 3)),
        (TTMatrix(rank=5), ReshapedSum(ranks=(0, 5)), (24, 20)),
    ],
    ids=["channel alone", "no spatial term", "no channel term", "paired alone"],
)
def test_one_term_is_the_plain_format(plain, setting, shape):
    weight = tensor_of(*shape)
    assert torch.equal(setting.fit(weight).reconstruct(), plain.fit(weight).reconstruct())
    assert setting.stored_bytes(shape, torch.float32) == plain.stored_bytes(shape, torch.float32)


def test_two_terms_of_one_reshape_are_no_better_than_their_sum_of_ranks():
    weight = tensor_of(24, 20)
    tail = torch.linalg.svdvals(weight.double())
    best = float(tail[6:].norm() / tail.norm())
    assert lost(weight, ReshapedSum(ranks=(4, 2), reshapes=("channel", "channel"))) == pytest.approx(best, rel=1e-3)


PLANTED = {
    "channel and spatial": (channel_part((24, 16, 3, 3), 2, 0) + spatial_part((24, 16, 3, 3), 3, 1), (2, 3)),
    "channel and paired": (channel_part((24, 36), 3, 0) + paired_part((24, 36), 2, 1), (3, 2)),
}


@pytest.mark.parametrize(("weight", "ranks"), PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_sum_is_better_recovered_than_by_either_term_alone(weight, ranks):
    setting = ReshapedSum(ranks=ranks)
    shape = tuple(weight.shape)
    stored = setting.stored_bytes(shape, torch.float32)
    together = lost(weight, setting)
    other = {"matricisation": "spatial"} if len(shape) > 2 else {}
    alone = [SVD.within(shape, torch.float32, stored)]
    alone.append(
        SVD.within(shape, torch.float32, stored, **other) if other else TTMatrix.within(shape, torch.float32, stored)
    )
    assert together < 0.05
    assert together < 0.3 * min(lost(weight, each) for each in alone)


@pytest.mark.parametrize("shape", [(24, 20), (16, 8, 3, 3), (31, 37), (12, 6, 5)], ids=str)
def test_richer_sums_lose_less_all_along(shape):
    weight, setting, errors = tensor_of(*shape), ReshapedSum(rank=1), []
    for _ in range(6):
        errors.append(lost(weight, setting))
        setting = setting.richer(shape)
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (0, 4), (5, 1)], ids=str)
@pytest.mark.parametrize("shape", [(24, 20), (16, 8, 3, 3)], ids=str)
def test_the_sum_is_at_least_as_good_as_its_first_sweep(shape, ranks):
    weight = tensor_of(*shape)
    rest, terms = weight, ReshapedSum(ranks=ranks).terms(shape)
    for term in terms:
        if term is not None:
            rest = rest - term.fit(rest).reconstruct().detach()
    assert lost(weight, ReshapedSum(ranks=ranks)) <= float(rest.norm() / weight.norm()) + 1e-6


@given(
    st.sampled_from([(24, 20), (16, 8, 3, 3), (31, 17), (8, 24, 5)]),
    st.floats(0.05, 0.9),
    st.sampled_from([torch.float32, torch.float16]),
    st.integers(0, 9),
)
@settings(deadline=None, max_examples=15)
def test_the_best_within_is_in_the_budget_and_no_worse_than_svd(shape, part, dtype, seed):
    weight = tensor_of(*shape, seed=seed) + 3 * channel_part(shape, 1, seed + 1)
    budget = int(part * weight.numel() * dtype.itemsize)
    found = ReshapedSum.best_within(weight, dtype, budget)
    uniform = ReshapedSum.within(shape, dtype, budget)
    rivals = [SVD.within(shape, dtype, budget)]
    if len(shape) > 2:
        rivals.append(SVD.within(shape, dtype, budget, matricisation="spatial"))
    rivals = [rival for rival in rivals if rival is not None]
    assert (found is None) == (uniform is None and not rivals)
    if found is not None:
        assert found.stored_bytes(shape, dtype) <= budget
        assert all(lost(weight, found) <= lost(weight, rival) + 1e-6 for rival in rivals)


@pytest.mark.parametrize(("shape", "part", "seed"), [((24, 20), 0.85, 3), ((31, 17), 0.85, 2), ((24, 20), 0.69, 1)])
def test_the_best_within_is_no_worse_than_one_rank_for_all(shape, part, seed):
    weight = tensor_of(*shape, seed=seed) + 3 * channel_part(shape, 1, seed + 1)
    budget = int(part * weight.numel() * 4)
    found = ReshapedSum.best_within(weight, torch.float32, budget)
    assert lost(weight, found) <= lost(weight, ReshapedSum.within(shape, torch.float32, budget)) + 1e-6


def test_the_best_within_takes_one_term_where_only_one_is_there():
    shape = (24, 16, 3, 3)
    budget = SVD(rank=3, matricisation="spatial").stored_bytes(shape, torch.float32)
    found = ReshapedSum.best_within(spatial_part(shape, 3, 0), torch.float32, budget)
    assert found.ranks == (0, 3)


@pytest.mark.parametrize("size", [1e-36, 1e36])
def test_the_best_within_does_not_depend_on_the_size_of_the_weight(size):
    shape = (24, 16, 3, 3)
    weight = spatial_part(shape, 3, 0)
    budget = SVD(rank=3, matricisation="spatial").stored_bytes(shape, torch.float32)
    expected = ReshapedSum.best_within(weight, torch.float32, budget)
    assert ReshapedSum.best_within(weight * size / 10, torch.float32, budget) == expected


@given(st.integers(0, 50), st.floats(1e-3, 3.0), st.integers(2, 40))
@settings(deadline=None, max_examples=50)
def test_keeping_values_above_a_threshold_is_the_best_rank_under_a_penalty(seed, penalty, cost):
    """Idelbayev & Carreira-Perpinan: the choice of _penalised, by trying every rank."""
    values = tensor_of(20, seed=seed, dtype=torch.float64).abs().sort(descending=True).values
    objective = [penalty * cost / 20 * r + float(values[r:].square().sum()) for r in range(21)]
    by_threshold = int((values.square() > penalty * cost / 20).sum())
    assert objective[by_threshold] == pytest.approx(min(objective))


def test_more_than_two_pairs_of_modes_are_refused():
    with pytest.raises(Exception, match="reshaped-sum"):
        ReshapedSum(rank=1, out_modes=(2, 2, 6), in_modes=(5, 2, 2)).fit(tensor_of(24, 20))


@pytest.mark.parametrize(
    "weight",
    [tensor_of(31, 37), torch.zeros(24, 20), torch.full((24, 20), -7.0), PLANTED["channel and spatial"][0]],
    ids=["random", "zero", "constant", "planted"],
)
@pytest.mark.parametrize("wanted", [0.5, 0.1])
def test_what_is_reached_is_within_the_error(weight, wanted):
    found = ReshapedSum.reaching(weight, wanted).fit(weight).reconstruct().detach()
    assert (found - weight).double().norm() <= wanted * weight.double().norm() * (1 + 1e-6)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_the_size_of_float64_values_does_not_matter(size):
    weight = tensor_of(12, 8, 3, 3, dtype=torch.float64)
    best = [ReshapedSum.best_within(each, torch.float64, weight.nbytes // 2) for each in (weight, weight * size)]
    assert best[0] == best[1]
