"""low-rank-sparse against planted truths, the paper's equations, and itself."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tcompress.cli.choices import choices
from tcompress.errors import FormatError, NumericalError, UsageError
from tcompress.formats import FORMATS, find_format, make, parse
from tcompress.formats.inner import INNER
from tcompress.formats.low_rank_sparse import METHODS, RECONSTRUCTIONS, LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.linalg.distance import compare
from tcompress.linalg.magnitude import keep_largest
from tcompress.linalg.output_error import output_error
from tcompress.workflow.plan import Target

COMBINATIONS = list(itertools.product(METHODS, RECONSTRUCTIONS))
every_combination = pytest.mark.parametrize(("method", "reconstruction"), COMBINATIONS)
every_inner = pytest.mark.parametrize("inner", list(INNER))


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(m: int, n: int, rank: int, support: float, size: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank**0.5
    where = torch.rand(m, n, generator=generator) < support
    return low, torch.where(where, size * torch.randn(m, n, generator=generator), 0)


def error(weight: torch.Tensor, setting: LowRankSparse | Sparse | SVD) -> float:
    return compare(weight, setting.fit(weight).reconstruct().detach())[1]


@pytest.mark.parametrize("size", [0.5, 1.0, 20.0, 1000.0])
@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_planted_low_rank_plus_sparse_is_recovered_exactly(size, reconstruction):
    low, sparse = planted(200, 300, 10, 0.05, size)
    density = int((sparse != 0).sum()) / sparse.numel()
    found = LowRankSparse(density=density, rank=10, reconstruction=reconstruction, rounds=80).fit(low + sparse)
    assert compare(low, found.low_rank.reconstruct().detach())[1] <= 1e-5 * max(1.0, size)
    assert compare(low + sparse, found.reconstruct().detach())[1] <= 1e-5


def test_robust_pca_has_no_smaller_error():
    tensorly = pytest.importorskip("tensorly.decomposition")
    low, sparse = planted(60, 80, 3, 0.05, 1.0)
    theirs, _ = tensorly.robust_pca((low + sparse).double().numpy(), reg_E=0.1, n_iter_max=500, tol=1e-8)
    density = int((sparse != 0).sum()) / sparse.numel()
    found = LowRankSparse(density=density, rank=3, rounds=80).fit(low + sparse)
    ours = compare(low, found.low_rank.reconstruct().detach())[1]
    assert ours <= compare(low, torch.from_numpy(theirs).float())[1] + 1e-6


def test_residual_is_the_plain_fit_and_its_largest_errors():
    weight = weight_of(24, 30)
    found = LowRankSparse(density=0.2, rank=3, method="residual").fit(weight)
    low = SVD(rank=3).fit(weight).reconstruct()
    assert torch.equal(found.low_rank.reconstruct(), low)
    assert torch.equal(found.sparse.reconstruct(), keep_largest(weight - low.detach(), 144))


def test_with_residual_all_entries_kept_give_the_weight():
    weight = weight_of(24, 30)
    for reconstruction in RECONSTRUCTIONS:
        setting = LowRankSparse(density=1.0, rank=3, method="residual", reconstruction=reconstruction)
        assert error(weight, setting) <= 1e-7


@every_inner
def test_masking_never_looks_at_entries_that_are_kept(inner):
    weight = weight_of(24, 30)
    kept = keep_largest(weight, 200) != 0
    generator = torch.Generator().manual_seed(7)
    louder = torch.where(kept, weight * (1 + 9 * torch.rand(weight.shape, generator=generator)), weight)
    setting = LowRankSparse(density=200 / 720, rank=2, low_rank=inner, method="masking", rounds=8)
    fits = [setting.fit(each).low_rank.reconstruct() for each in (weight, louder)]
    assert torch.equal(*fits)


def test_masking_recovers_what_large_entries_hide():
    low, _ = planted(100, 120, 4, 0, 0)
    spikes = torch.rand(low.shape, generator=torch.Generator().manual_seed(8)) < 0.1
    weight = torch.where(spikes, 100 * torch.sign(low), low)
    setting = LowRankSparse(density=int(spikes.sum()) / low.numel(), rank=4, method="masking", rounds=80)
    assert compare(low, setting.fit(weight).low_rank.reconstruct().detach())[1] <= 1e-5
    assert error(weight, setting) <= 1e-5


@every_inner
def test_masking_leaves_less_outside_the_mask_than_the_plain_fit(inner):
    weight = weight_of(32, 48)
    setting = LowRankSparse(density=0.3, rank=3, low_rank=inner, method="masking", rounds=20)
    outside = keep_largest(weight, setting.kept(weight.numel())) == 0
    rests = [
        (weight - one.fit(weight).low_rank.reconstruct())[outside].norm()
        for one in (setting, LowRankSparse(density=0.3, rank=3, low_rank=inner, method="residual"))
    ]
    assert rests[0] < rests[1]


@pytest.mark.parametrize("method", METHODS)
def test_both_reconstructions_give_the_same_weight(method):
    weight = weight_of(30, 40)
    additive, masking = (
        LowRankSparse(density=0.2, rank=3, method=method, reconstruction=reconstruction).fit(weight)
        for reconstruction in ("additive", "masking")
    )
    torch.testing.assert_close(additive.reconstruct(), masking.reconstruct())
    kept = additive.sparse.reconstruct() != 0
    assert torch.equal(masking.sparse.reconstruct(), torch.where(kept, weight, 0))
    assert torch.equal(masking.reconstruct()[kept], weight[kept])


@every_inner
@pytest.mark.parametrize("shape", [(48, 64), (16, 8, 3, 3), (32, 1, 3, 3)], ids=str)
def test_alternating_leaves_less_than_residual(inner, shape):
    weight = weight_of(*shape)
    errors = [
        error(weight, LowRankSparse(density=0.25, rank=1, low_rank=inner, method=method, rounds=10))
        for method in ("alternating", "residual")
    ]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@every_inner
def test_a_second_moment_lowers_the_error_of_the_output(kind, inner):
    generator = torch.Generator().manual_seed(5)
    weight = weight_of(32, 48)
    inputs = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    inputs *= torch.rand(48, generator=generator) ** 3
    moment = inputs.T @ inputs / 300
    setting = LowRankSparse(density=0.2, rank=2, low_rank=inner, rounds=15)
    given = moment.diagonal().clone() if kind == "diagonal" else moment
    plain = output_error(weight - setting.fit(weight).reconstruct().detach(), given)
    assert output_error(weight - setting.fit(weight, given).reconstruct().detach(), given) < plain


@pytest.mark.parametrize("reconstruction", RECONSTRUCTIONS)
def test_a_second_moment_works_with_both_reconstructions_and_convolutions(reconstruction):
    generator = torch.Generator().manual_seed(6)
    weight, inputs = weight_of(16, 8, 3, 3), torch.randn(500, 72, generator=generator)
    inputs[:, 40:] *= 0.05
    moment = inputs.T @ inputs / 500
    for low_rank in ("svd", "svd:matricisation=spatial", "tucker"):
        setting = LowRankSparse(density=0.2, rank=2, low_rank=low_rank, reconstruction=reconstruction, rounds=10)
        errors = [
            output_error((weight - setting.fit(weight, gram).reconstruct().detach()).reshape(16, 72), moment)
            for gram in (moment, None)
        ]
        assert errors[0] < errors[1]


def test_an_identity_for_a_moment_changes_nothing_much():
    weight = weight_of(32, 48)
    setting = LowRankSparse(density=0.2, rank=3)
    with_identity = compare(weight, setting.fit(weight, torch.ones(48)).reconstruct().detach())[1]
    assert with_identity == pytest.approx(error(weight, setting), rel=1e-3)


def test_a_moment_of_another_size_is_refused():
    with pytest.raises(NumericalError, match="second moment of 48 inputs"):
        LowRankSparse(rank=2).fit(weight_of(32, 48), torch.ones(32))


def test_the_share_is_a_part_of_the_elements():
    shape = (100, 200)
    for share, rank in ((0.1, 6), (0.5, 33), (0.015, 1), (0.01, 0)):
        setting = LowRankSparse(share=share)
        inner = setting.low_rank_setting(shape)
        assert (inner.rank if inner is not None else 0) == rank
        assert setting.pinned(shape).rank == rank
    assert LowRankSparse().low_rank_setting(shape) == SVD(rank=6)
    assert LowRankSparse(share=0.01).notes(shape) == ("its share is too small for a low-rank part",)


def test_share_auto_is_never_worse_than_either_part_alone():
    low, sparse = planted(96, 128, 3, 0.05, 1.0)
    weights = {"both": low + sparse, "noise": weight_of(96, 128), "low rank": low + 0.01 * weight_of(96, 128)}
    budget = int(0.2 * 96 * 128 * 4)
    for name, weight in weights.items():
        found = LowRankSparse.best_within(weight, torch.float32, budget, share="auto")
        assert found is not None
        assert found.stored_bytes((96, 128), torch.float32) <= budget
        alone = error(weight, Sparse.within((96, 128), torch.float32, budget))
        low_alone = error(weight, SVD.within((96, 128), torch.float32, budget))
        assert error(weight, found) <= 1.02 * min(alone, low_alone), name
    assert error(weights["both"], LowRankSparse.best_within(low + sparse, torch.float32, budget, share="auto")) < 0.01


def test_share_auto_is_the_best_of_the_shares_when_all_rounds_are_made():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 96, generator=generator))[0] for n in (96, 128))
    weight = left * torch.arange(1, 97) ** -0.5 @ right.T
    budget = int(0.5 * weight.numel() * 4)
    shares = [LowRankSparse.within((96, 128), torch.float32, budget, share=n / 64) for n in range(1, 32)]
    best = min(error(weight, setting) for setting in shares if setting is not None)
    assert error(weight, LowRankSparse.best_within(weight, torch.float32, budget, share="auto")) <= 1.005 * best


def test_share_auto_without_a_budget_is_refused():
    with pytest.raises(FormatError, match="share=auto looks for the best use of a budget; give keep"):
        LowRankSparse(share="auto").fit(weight_of(8, 8))


@pytest.mark.parametrize("keep", [0.5, 0.25, 0.125])
def test_a_budget_is_shared_and_kept(keep):
    shape = (64, 96)
    budget = int(keep * 64 * 96 * 4)
    for options in ({}, {"rank": 2}, {"share": 0.05}, {"low_rank": "tt"}):
        setting = LowRankSparse.within(shape, torch.float32, budget, **options)
        assert setting.stored_bytes(shape, torch.float32) <= budget
        assert setting.richer(shape).stored_bytes(shape, torch.float32) > budget
    inner = LowRankSparse.within(shape, torch.float32, budget).low_rank_setting(shape)
    assert inner.stored_bytes(shape, torch.float32) <= budget / 4


def test_no_setting_fits_less_than_its_low_rank_part():
    assert LowRankSparse.within((64, 96), torch.float32, 4 * 8 * 160, rank=8) is None


@pytest.mark.parametrize("density", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("rank", [0, 1, 5])
@every_combination
def test_the_ends_of_every_scale_are_legal(density, rank, method, reconstruction):
    weight = weight_of(12, 10)
    setting = LowRankSparse(density=density, rank=rank, method=method, reconstruction=reconstruction)
    found = setting.fit(weight)
    assert found.reconstruct().isfinite().all()
    assert int((found.sparse.reconstruct() != 0).sum()) == setting.kept(120)
    assert (found.low_rank is None) == (rank == 0)
    if rank == 0:
        assert torch.equal(found.reconstruct(), keep_largest(weight, setting.kept(120)))
    if density == 0:
        whole = SVD(rank=rank).fit(weight).reconstruct() if rank else torch.zeros(12, 10)
        torch.testing.assert_close(found.reconstruct(), whole)
    loaded = setting.load((12, 10), dict(found.state_dict()))
    assert torch.equal(loaded.reconstruct(), found.reconstruct())


@every_combination
def test_zeros_constants_and_ties_are_no_trouble(method, reconstruction):
    signs = torch.sign(weight_of(16, 12))
    for weight in (torch.zeros(16, 12), torch.ones(16, 12), torch.eye(16, 12), signs):
        setting = LowRankSparse(density=0.25, rank=2, method=method, reconstruction=reconstruction)
        first, second = setting.fit(weight), setting.fit(weight)
        assert first.reconstruct().isfinite().all()
        for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert error(torch.zeros(16, 12), LowRankSparse(density=0.25, rank=2)) == 0
    assert error(torch.ones(16, 12), LowRankSparse(density=0.25, rank=2)) <= 1e-6


def test_a_tolerance_is_reached_with_fewer_values_than_the_residual_needs():
    weight = weight_of(40, 60)
    for method in ("residual", "alternating"):
        setting = LowRankSparse.reaching(weight, 0.3, rank=3, method=method)
        assert error(weight, setting) <= 0.3 + 1e-6
    assert setting.density < LowRankSparse.reaching(weight, 0.3, rank=3, method="residual").density


def test_lrs_is_short_for_it():
    assert find_format("lrs") is LowRankSparse
    kind, options = parse("lrs:rank=4:low_rank=tt:low_rank.order=3")
    assert make(kind, options) == LowRankSparse(rank=4, low_rank="tt:order=3")
    assert "lrs" not in FORMATS


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"density": 1.5}, "density must be a fraction"),
        ({"rank": 2, "share": 0.1}, "give one of rank, ranks and share"),
        ({"share": 2}, "share must be a fraction from 0 to 1, or auto"),
        ({"share": "much"}, "share must be a fraction from 0 to 1, or auto"),
        ({"share": True}, "share must be a fraction"),
        ({"share": math.nan}, "share must be a fraction"),
        ({"method": "magic"}, "method is one of alternating, residual, masking"),
        ({"reconstruction": 3}, "reconstruction is one of additive, masking"),
        ({"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({"low_rank": "sparse"}, "low_rank is one of svd, tt, ttm, tucker, cp"),
        ({"low_rank": "svd:rank=3"}, "the rank is low-rank-sparse's own option"),
        ({"low_rank": 7}, "low_rank is the name of a format"),
        ({"low_rank": "tt:nothing=1"}, "tt: has no option nothing"),
        ({"ranks": (1, 2)}, "svd has one rank"),
        ({"rank": -1}, "rank must be a whole number of at least 0"),
    ],
    ids=str,
)
def test_senseless_options_are_refused(options, reason):
    with pytest.raises(FormatError, match=reason):
        make(LowRankSparse, options)


@pytest.mark.parametrize(
    "factors",
    [
        {},
        {"sparse.matrix": (5, 6), "low_rank.left": (5, 1)},
        {"sparse.matrix": (6, 5)},
        {"sparse.matrix": (5, 6), "other": (1,)},
        {"low_rank.left": (5, 1), "low_rank.right": (1, 6)},
    ],
    ids=str,
)
def test_factors_that_do_not_make_the_weight_are_refused(factors):
    tensors = {name: torch.zeros(shape) for name, shape in factors.items()}
    with pytest.raises(FormatError, match="low-rank-sparse: "):
        LowRankSparse(rank=1).load((5, 6), tensors)


@pytest.mark.parametrize(
    ("text", "budget", "expected"),
    [
        ("lrs:density=0.2", {}, LowRankSparse(density=0.2)),
        ("lrs:density=0.2", {"rank": 3}, LowRankSparse(density=0.2, rank=3)),
        ("lrs:rank=3", {}, LowRankSparse(rank=3)),
        ("lrs:low_rank=tt:ranks=2,3,2", {}, LowRankSparse(low_rank="tt", ranks=(2, 3, 2))),
        ("lrs", {"rank": 3}, LowRankSparse(rank=3)),
        ("lrs:rank=3", {"keep": 0.5}, Target(LowRankSparse, {"rank": 3}, keep=0.5)),
        (
            "lrs:low_rank=tt:ranks=2,3,2",
            {"keep": 0.5},
            Target(LowRankSparse, {"low_rank": "tt", "ranks": (2, 3, 2)}, 0.5),
        ),
        ("lrs:share=auto", {"keep": 0.5}, Target(LowRankSparse, {"share": "auto"}, keep=0.5)),
        ("lrs", {"tolerance": 0.1}, Target(LowRankSparse, {}, tolerance=0.1)),
    ],
    ids=str,
)
def test_either_part_can_be_given_beside_a_budget(text, budget, expected):
    (found,) = choices([text], **{"rank": None, "keep": None, "tolerance": None, **budget}, seed=0)
    assert found == expected


@pytest.mark.parametrize(
    ("text", "budget", "reason"),
    [
        ("lrs", {}, "how much is to be kept"),
        ("lrs:share=auto", {}, "how much is to be kept"),
        ("lrs:density=0.2", {"keep": 0.5}, "says its density already; leave out --keep"),
        ("lrs:density=0.2:rank=3", {"rank": 4}, "says its density already; leave out --rank"),
        ("lrs:density=0.2:share=0.1", {"rank": 4}, "give one of rank, ranks and share"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(text, budget, reason):
    with pytest.raises(UsageError, match=reason):
        choices([text], **{"rank": None, "keep": None, "tolerance": None, **budget}, seed=0)


EXTREMES = [(torch.float32, 1e36), (torch.float32, 1e-36), (torch.float64, 1e200), (torch.float64, 1e-200)]


@pytest.mark.parametrize(("dtype", "size"), EXTREMES, ids=str)
@pytest.mark.parametrize("moment", ["none", "full", "diagonal", "singular", "zero columns"])
@pytest.mark.parametrize("inner", ["svd", "tt", "cp"])
def test_the_size_of_the_weight_does_not_matter(inner, moment, dtype, size):
    inputs = weight_of(100, 48, seed=9).to(dtype)
    gram = {
        "none": None,
        "full": inputs.T @ inputs,
        "diagonal": inputs.square().sum(dim=0),
        "singular": inputs[:20].T @ inputs[:20],
        "zero columns": torch.diag(inputs.square().sum(dim=0) * (torch.arange(48) % 3 > 0)),
    }[moment]
    weight = weight_of(40, 48).to(dtype)
    setting = LowRankSparse(density=0.2, rank=2, low_rank=inner, rounds=3)
    plain, scaled = (
        compare(each, setting.fit(each, gram).reconstruct().detach())[1] for each in (weight, weight * size)
    )
    assert scaled == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize(
    ("moment_type", "size"),
    [
        *itertools.product([torch.float32, torch.float64], [1e-30, 1e30]),
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
    ],
    ids=str,
)
def test_the_size_of_the_moment_does_not_matter(size, moment_type):
    inputs = weight_of(100, 48, seed=9).double()
    gram = (inputs.T @ inputs * size).to(moment_type)
    weight, setting = weight_of(40, 48), LowRankSparse(density=0.2, rank=2, rounds=3)
    expected = setting.fit(weight, inputs.T @ inputs).reconstruct()
    torch.testing.assert_close(setting.fit(weight, gram).reconstruct(), expected, rtol=1e-3, atol=1e-3)
    for density in (0.0, 1.0):
        assert LowRankSparse(density=density, rank=2).fit(weight, gram).reconstruct().isfinite().all()


def test_values_beyond_the_range_are_refused():
    inputs = weight_of(5, 48, seed=9)
    weight = 3e37 * weight_of(40, 48).clamp(-10, 10)
    with pytest.raises(NumericalError, match="exceeds the range of"):
        LowRankSparse(density=0.2, rank=2, rounds=20).fit(weight, inputs.T @ inputs)


@every_combination
def test_inputs_in_any_layout_give_equal_factors_and_stay_as_they_are(method, reconstruction):
    weight = weight_of(24, 36)
    gram = weight_of(36, 36, seed=3)
    gram = gram @ gram.T
    setting = LowRankSparse(density=0.25, rank=2, method=method, reconstruction=reconstruction, rounds=5)
    strided = torch.empty(36, 24).T.copy_(weight)
    sliced = torch.zeros(48, 72)[::2, ::2].copy_(weight)
    for moment in (None, gram):
        fits = [setting.fit(each, moment).state_dict() for each in (weight, strided, sliced)]
        for other in fits[1:]:
            assert all(torch.equal(fits[0][name], other[name]) for name in other)
    assert torch.equal(strided, weight_of(24, 36))
    assert torch.equal(sliced, weight_of(24, 36))


def test_the_alternation_takes_the_memory_of_few_weights():
    weight = weight_of(1024, 1024)
    setting = LowRankSparse(density=0.5, rank=16, rounds=3)
    setting.fit(weight[:64])
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        setting.fit(weight)
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert most <= 8 * weight.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_directions_that_no_input_has_do_not_let_values_grow(samples, dtype):
    inputs = torch.randn(samples, 48, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    weight = torch.randn(40, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = (inputs.T @ inputs / samples).to(dtype)
    found = LowRankSparse(density=0.2, rank=2, rounds=20).fit(weight.to(dtype), gram)
    rebuilt = found.reconstruct().detach().double()
    assert float(((weight - rebuilt) @ inputs.T).norm() / (weight @ inputs.T).norm()) < 1e-6
    assert float((weight - rebuilt).norm() / weight.norm()) < 1.5


@pytest.mark.parametrize("method", METHODS)
def test_all_values_are_kept_where_all_are_asked_for_though_some_inputs_are_zero(method):
    weight, moment = weight_of(12, 20), (torch.arange(20) % 3 > 0).float()
    for gram in (moment, torch.diag(moment)):
        found = LowRankSparse(density=1.0, rank=2, method=method).fit(weight, gram)
        assert compare(weight, found.reconstruct().detach())[1] <= 1e-6
