"""joint against independent truth: planted shared bases, and the SVD of the members side by side."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import FormatError, NumericalError
from tcompress.formats.joint import Joint
from tcompress.formats.metric import Metric
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rebuilt(setting, weights):
    shared, own = setting.fit_together(weights)
    shape = tuple(weights[0].shape)
    return [setting.load(shape, {**shared, **each}).reconstruct().detach() for each in own]


def errors(setting, weights):
    found = zip(weights, rebuilt(setting, weights), strict=True)
    return [float((weight - each).double().norm() / weight.double().norm()) for weight, each in found]


def planted(members, *shape, n=2, p=4, q=3):
    """Members that are mixtures of n cores between bases of p outputs and q inputs, each of a size of its own."""
    k = torch.Size(shape[2:]).numel()
    rows, out_basis, in_basis = tensor_of(members, n), tensor_of(shape[0], p, seed=1), tensor_of(shape[1], q, seed=2)
    core = tensor_of(n, p, q, k, seed=3)
    stack = torch.einsum("mn,npqk,op,iq->moik", rows, core, out_basis, in_basis).reshape(members, *shape)
    return [weight * 3.0**position for position, weight in enumerate(stack)]


SHAPES = [(24, 20), (16, 12, 3, 3), (16, 12, 5)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planted_bases_are_recovered_in_fewer_bytes_than_any_member_alone(shape):
    weights = planted(5, *shape)
    setting = Joint(ranks=(2, 4, 3))
    assert max(errors(setting, weights)) < 1e-5
    stored = setting.group_bytes(shape, torch.float32, 5)
    for kind in (SVD, Tucker):
        alone = [kind.within(shape, torch.float32, stored // 5) for _ in weights]
        assert all(
            each is None or (each.fit(weight).reconstruct() - weight).norm() > 0.01 * weight.norm()
            for weight, each in zip(weights, alone, strict=True)
        )
    assert max(errors(Joint(ranks=(1, 4, 3)), weights)) > 0.05
    assert max(errors(Joint(ranks=(2, 3, 3)), weights)) > 0.05
    assert max(errors(Joint(ranks=(2, 4, 2)), weights)) > 0.05


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shared_basis_of_the_inputs_is_recovered(shape):
    fan_in = torch.Size(shape[1:]).numel()
    basis = tensor_of(3, fan_in)
    weights = [(tensor_of(shape[0], 3, seed=k + 1) @ basis).reshape(shape) * 10.0**k for k in range(4)]
    assert max(errors(Joint(rank=3, method="svd"), weights)) < 1e-5
    assert max(errors(Joint(rank=2, method="svd"), weights)) > 0.05


@pytest.mark.parametrize("method", ["tucker", "svd"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_member_takes_no_rank_from_the_others(shape, method):
    weights = [tensor_of(*shape, seed=k) for k in range(4)]
    louder = [weights[0], weights[1] * 1000, weights[2] * 1e-3, weights[3]]
    setting = Joint(rank=5, method=method)
    assert errors(setting, louder) == pytest.approx(errors(setting, weights), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 6])
def test_the_shared_basis_is_that_of_the_svd_of_all_normalised_members(shape, rank):
    weights = [(k + 1) ** 2 * tensor_of(*shape, seed=k, dtype=torch.float64) for k in range(3)]
    matrix = torch.cat([(weight / weight.norm()).reshape(shape[0], -1) for weight in weights])
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = ((left[:, :rank] * values[:rank]) @ right[:rank]).reshape(3, *shape)
    for weight, expected, found in zip(weights, best, rebuilt(Joint(rank=rank, method="svd"), weights), strict=True):
        torch.testing.assert_close(found, expected * weight.norm(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_one_member_alone_is_its_tucker_or_its_svd(rank):
    kernel, matrix = tensor_of(16, 12, 3, 3), tensor_of(24, 20)
    alone = Tucker(ranks=(rank, rank)).fit(kernel).reconstruct().detach()
    expected = float((alone - kernel).norm() / kernel.norm())
    assert errors(Joint(ranks=(1, rank, rank)), [kernel]) == pytest.approx([expected], rel=1e-3)
    alone = SVD(rank=rank).fit(matrix).reconstruct().detach()
    expected = float((alone - matrix).norm() / matrix.norm())
    assert errors(Joint(rank=rank), [matrix]) == pytest.approx([expected], rel=1e-4)
    assert errors(Joint(rank=rank, method="svd"), [matrix]) == pytest.approx([expected], rel=1e-4)


@pytest.mark.parametrize("setting", [Joint(rank=3), Joint(ranks=(2, 9, 99)), Joint(rank=7, method="svd")], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_the_factors_have_the_announced_shapes_and_bytes(setting, shape, members):
    shared, own = setting.fit_together([tensor_of(*shape, seed=k) for k in range(members)])
    shared_specs, own_specs = setting.group_specs(shape, torch.float32, members)
    assert {name: tuple(factor.shape) for name, factor in shared.items()} == {
        name: spec.shape for name, spec in shared_specs.items()
    }
    assert len(own) == members
    for each in own:
        assert {name: tuple(f.shape) for name, f in each.items()} == {n: spec.shape for n, spec in own_specs.items()}
    values = sum(f.numel() for f in shared.values()) + sum(f.numel() for each in own for f in each.values())
    assert setting.group_bytes(shape, torch.float32, members) == 4 * values


@pytest.mark.parametrize("method", ["tucker", "svd"])
def test_members_that_are_zero_stay_zero_and_leave_the_others_alone(method):
    weights = [torch.zeros(24, 20) for _ in range(3)]
    assert all(not each.any() for each in rebuilt(Joint(rank=3, method=method), weights))
    mixed = [tensor_of(24, 20), torch.zeros(24, 20), tensor_of(24, 20, seed=1)]
    found = rebuilt(Joint(rank=24, method=method), mixed)
    assert not found[1].any()
    assert all(each.isfinite().all() for each in found)
    without = errors(Joint(rank=2, method=method), [mixed[0], mixed[2]])
    found = rebuilt(Joint(rank=2, method=method), mixed)
    for weight, each, expected in zip((mixed[0], mixed[2]), (found[0], found[2]), without, strict=True):
        assert float((weight - each).norm() / weight.norm()) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", ["tucker", "svd"])
@pytest.mark.parametrize("members", [1, 3])
def test_within_is_within_and_one_more_is_not(members, method):
    for budget in (50, 500, 3000, 6000):
        found = Joint.within_together((24, 20), torch.float32, budget, members, method=method)
        if found is None:
            assert Joint(rank=1, method=method).group_bytes((24, 20), torch.float32, members) > budget
            continue
        assert found.group_bytes((24, 20), torch.float32, members) <= budget
        more = Joint(rank=found.rank + 1, method=method)
        is_full = more.group_specs((24, 20), torch.float32, members) == found.group_specs(
            (24, 20), torch.float32, members
        )
        assert is_full or more.group_bytes((24, 20), torch.float32, members) > budget


@pytest.mark.parametrize("method", ["tucker", "svd"])
@pytest.mark.parametrize("wanted", [0.5, 0.1, 1e-3])
def test_what_is_reached_holds_for_every_member(method, wanted):
    weights = planted(4, 24, 20)
    found = Joint.reaching_together(weights, wanted, method=method)
    assert max(errors(found, weights)) <= wanted * (1 + 1e-6)
    if found.rank > 1:
        assert max(errors(Joint(rank=found.rank - 1, method=method), weights)) > wanted


def test_members_whose_norm_is_beyond_their_type_are_an_error_or_fit():
    weights = [torch.full((64, 64), 1e37), torch.ones(64, 64)]
    assert all(each.isfinite().all() for each in rebuilt(Joint(rank=1, method="svd"), weights))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "joint: give one of rank and ranks"),
        ({"rank": 1, "ranks": (1, 1, 1)}, "joint: give one of rank and ranks"),
        ({"ranks": (1, 1)}, "joint: ranks are three"),
        ({"ranks": (1, 1, 1), "method": "svd"}, "joint: ranks are three, of layers, outputs and inputs, for tucker"),
        ({"ranks": (1, 0, 1)}, "joint: ranks must be a whole number of at least 1"),
        ({"ranks": (1, True, 1)}, "joint: ranks must be a whole number of at least 1"),
        ({"rank": 1, "method": "cp"}, "joint: method is one of tucker, svd, got 'cp'"),
        ({"rank": 1, "method": ["svd"]}, "joint: method is one of tucker, svd, got"),
    ],
    ids=str,
)
def test_senseless_options_are_refused_by_name(options, said):
    with pytest.raises(FormatError) as caught:
        Joint(**options)
    assert str(caught.value).startswith(said)


def moment(fan_in, count, seed):
    """The second moment of so many inputs that vary in size and depend on each other."""
    mixing = tensor_of(fan_in, fan_in, seed=seed) * tensor_of(fan_in, seed=seed + 1)
    inputs = tensor_of(count, fan_in, seed=seed + 2) @ mixing
    return inputs.T @ inputs / count


def metrics_of(kind, members, out, fan_in):
    full = [Metric(moment(fan_in, 3 * fan_in, 10 * k)) for k in range(members)]
    if kind == "full":
        return full
    if kind == "rank-deficient":
        return [Metric(moment(fan_in, fan_in // 2, 10 * k)) for k in range(members)]
    if kind == "dead inputs":
        alive = (torch.arange(fan_in) % 3 != 1).float()
        return [Metric(metric.gram * torch.outer(alive, alive)) for metric in full]
    diagonals = [Metric(metric.gram.diagonal().clone()) for metric in full]
    rows = [Metric(rows=tensor_of(out, seed=k).square() + 0.01) for k in range(members)]
    mixed = [full[0], *diagonals[1:2], Metric(), *rows[3:]]
    return {"diagonal": diagonals, "rows": rows, "mixed": mixed}[kind]


def summed(setting, weights, metrics, found):
    shape = tuple(weights[0].shape)
    total = 0.0
    for weight, own, metric in zip(weights, found[1], metrics, strict=True):
        error = (
            (weight - setting.load(shape, {**found[0], **own}).reconstruct().detach()).double().reshape(len(weight), -1)
        )
        if metric.rows is not None:
            total += float((error.square().sum(1) * metric.rows).sum())
        else:
            gram = torch.ones(error.shape[1]) if metric.gram is None else metric.gram
            gram = (torch.diag(gram) if gram.ndim == 1 else gram).double()
            total += float((error @ gram * error).sum())
    return total


JOINTS = [Joint(ranks=(2, 5, 5)), Joint(rank=5, method="svd")]
KINDS = ["full", "rank-deficient", "diagonal", "rows", "dead inputs", "mixed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", JOINTS, ids=str)
@pytest.mark.parametrize("shape", [(24, 20), (8, 6, 3, 3)], ids=str)
def test_knowing_what_counts_makes_the_summed_error_small_and_never_larger(shape, setting, kind):
    weights = [tensor_of(*shape, seed=k) * 3.0**k for k in range(4)]
    metrics = metrics_of(kind, 4, shape[0], weights[0][0].numel())
    plain, found = setting.fit_together(weights), setting.fit_together(weights, metrics)
    before, after = (summed(setting, weights, metrics, each) for each in (plain, found))
    assert after < (1 if kind == "mixed" else 0.95) * before
    assert all(bool(factor.isfinite().all()) for each in (found[0], *found[1]) for factor in each.values())


@pytest.mark.parametrize("setting", JOINTS, ids=str)
def test_a_fit_for_outputs_is_the_same_each_time_and_leaves_what_it_is_given_alone(setting):
    weights, metrics = [tensor_of(24, 20, seed=k) for k in range(3)], metrics_of("full", 3, 24, 20)
    first, second = (setting.fit_together(weights, metrics) for _ in range(2))
    specs = setting.group_specs((24, 20), torch.float32, 3)
    for one, two, announced in zip((first[0], first[1][2]), (second[0], second[1][2]), specs, strict=True):
        assert {name: tuple(factor.shape) for name, factor in one.items()} == {
            name: spec.shape for name, spec in announced.items()
        }
        assert all(torch.equal(factor, two[name]) for name, factor in one.items())
    assert all(torch.equal(weight, tensor_of(24, 20, seed=k)) for k, weight in enumerate(weights))
    kept = metrics_of("full", 3, 24, 20)
    assert all(torch.equal(one.gram, two.gram) for one, two in zip(metrics, kept, strict=True))


@pytest.mark.parametrize("kind", ["full", "rank-deficient", "rows"])
def test_a_basis_for_inputs_that_are_alike_or_for_rows_is_the_best_there_is(kind):
    weights = [tensor_of(24, 20, seed=k) * 2.0**k for k in range(3)]
    if kind == "rows":
        metrics = metrics_of(kind, 3, 24, 20)
        seen = [weight * metric.rows.sqrt()[:, None] for weight, metric in zip(weights, metrics, strict=True)]
    else:
        gram = metrics_of(kind, 1, 24, 20)[0].gram
        metrics = [Metric(gram * 9.0**k) for k in range(3)]
        values, vectors = torch.linalg.eigh(gram.double())
        root = vectors * values.clamp_min(0).sqrt()
        seen = [3.0**k * weight.double() @ root for k, weight in enumerate(weights)]
    setting = Joint(rank=6, method="svd")
    lost = torch.linalg.svdvals(torch.cat(seen).double())[6:].square().sum()
    found = setting.fit_together(weights, metrics)
    assert summed(setting, weights, metrics, found) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("setting", JOINTS, ids=str)
def test_a_member_that_counts_more_is_kept_better(setting):
    weights = [tensor_of(24, 20, seed=k) for k in range(3)]
    errors_of_first = []
    for size in (1.0, 100.0):
        metrics = [Metric(size * torch.ones(20)), Metric(torch.ones(20)), Metric(torch.ones(20))]
        found = setting.fit_together(weights, metrics)
        errors_of_first.append(summed(setting, weights[:1], [Metric()], (found[0], found[1][:1])))
    assert errors_of_first[1] < 0.9 * errors_of_first[0]


@pytest.mark.parametrize("scale", [1e30, 1e-30])
@pytest.mark.parametrize("setting", JOINTS, ids=str)
def test_weights_and_moments_of_any_size_are_fitted(setting, scale):
    weights = [tensor_of(24, 20, seed=k) for k in range(3)]
    metrics = metrics_of("full", 3, 24, 20)
    expected = summed(setting, weights, metrics, setting.fit_together(weights, metrics))
    shared, own = setting.fit_together([w * scale for w in weights], [Metric(m.gram / scale) for m in metrics])
    wide = {name: factor.double() for name, factor in shared.items()}
    back = [{name: factor.double() / scale for name, factor in each.items()} for each in own]
    assert summed(setting, weights, metrics, (wide, back)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ([Metric(torch.eye(20))], "2 weights have as many metrics, got 1"),
        ([Metric(torch.eye(20)), Metric(torch.eye(24))], "second moment"),
        ([Metric(), Metric(torch.full((20, 20), torch.nan))], "second moment"),
        ([Metric(rows=torch.ones(24)), Metric(rows=torch.ones(20))], "24 positive numbers"),
        ([Metric(rows=torch.ones(24)), Metric(rows=torch.zeros(24))], "24 positive numbers"),
    ],
)
def test_metrics_that_are_not_those_of_the_weights_are_refused(metrics, said):
    with pytest.raises(NumericalError, match=said):
        Joint(rank=3).fit_together([tensor_of(24, 20), tensor_of(24, 20, seed=1)], metrics)
