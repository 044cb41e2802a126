"""The laws of formats/base.py, for every format there is and every kind of weight."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from tcompress.encodings import FactorSpec, cheapest, value_type
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import FORMATS, from_dict, make, parse, to_dict

SHAPES = {
    "square": (24, 24),
    "wide": (10, 60),
    "tall": (60, 10),
    "prime": (31, 37),
    "one row": (1, 40),
    "one column": (40, 1),
    "conv1d": (12, 6, 5),
    "conv2d": (16, 8, 3, 3),
    "conv3d": (8, 4, 3, 3, 3),
    "grouped conv": (12, 3, 3, 3),
    "depthwise conv": (24, 1, 3, 3),
    "embedding": (50, 12),
}
# Their fits are local optima: a size that fails may lie above one that does, and one too large is never tried.
SEARCHED = {"cp", "sparse-product", "low-rank-sparse"}
STORED = (torch.float32, torch.bfloat16, torch.int8, torch.int4, torch.int3)

everywhere = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
every_format = pytest.mark.parametrize("format_type", FORMATS.values(), ids=FORMATS.keys())


def weight_of(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def settings(format_type, shape):
    """From poor to rich: what fits a tenth, a third and all of the dense bytes."""
    dense = math.prod(shape) * 4
    found = [format_type.within(shape, torch.float32, int(part * dense)) for part in (0.1, 0.35, 0.7, 4)]
    return [setting for setting in found if setting is not None]


@cache
def fitted(setting, shape):
    """The fit to this shape's random weight: once for all laws, none of which may change it."""
    return setting.fit(weight_of(shape))


def error(weight, factorization):
    return float((weight - factorization.reconstruct().detach()).norm() / weight.norm())


@everywhere
@every_format
def test_the_reconstruction_has_the_weights_shape(format_type, shape):
    for setting in settings(format_type, shape):
        assert tuple(fitted(setting, shape).reconstruct().shape) == shape


@everywhere
@every_format
def test_at_full_setting_the_weight_comes_back(format_type, shape):
    full = settings(format_type, shape)[-1]
    assert full.richer(shape) is None
    assert error(weight_of(shape), fitted(full, shape)) < 1e-5


@everywhere
@every_format
def test_more_stored_bytes_never_mean_a_larger_error(format_type, shape):
    weight = weight_of(shape)
    found = [
        (s.stored_bytes(shape, torch.float32), error(weight, fitted(s, shape))) for s in settings(format_type, shape)
    ]
    for (poor_bytes, poor_error), (rich_bytes, rich_error) in pairwise(found):
        assert rich_bytes >= poor_bytes
        assert rich_error <= poor_error + 1e-6


@pytest.mark.parametrize("shape", [(24, 20), (20, 24)])
@every_format
def test_linear_equals_the_dense_operation(format_type, shape):
    for setting in settings(format_type, shape):
        factorization = fitted(setting, shape)
        x = weight_of((5, 3, shape[1]), seed=1)
        torch.testing.assert_close(factorization.linear(x), F.linear(x, factorization.reconstruct()))


GEOMETRIES = {
    "plain": ((16, 8, 3, 3), {}),
    "strided": ((16, 8, 3, 3), {"stride": 2, "padding": 1}),
    "dilated": ((16, 8, 3, 3), {"dilation": 2, "padding": 2}),
    "padded by name": ((16, 8, 3, 3), {"padding": "same"}),
    "1d": ((12, 6, 5), {"stride": 2, "padding": 2}),
    "3d": ((8, 4, 3, 3, 3), {"padding": 1}),
    "grouped": ((12, 3, 3, 3), {"groups": 4, "padding": 1}),
    "depthwise": ((24, 1, 3, 3), {"groups": 24, "stride": 2}),
}


@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
@every_format
def test_conv_equals_the_dense_operation(format_type, shape, geometry):
    dense = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[len(shape)]
    x = weight_of((2, shape[1] * geometry.get("groups", 1), *[9] * (len(shape) - 2)), seed=1)
    for setting in settings(format_type, shape):
        factorization = fitted(setting, shape)
        expected = dense(x, factorization.reconstruct(), **geometry)
        torch.testing.assert_close(factorization.conv(x, **geometry), expected, rtol=1e-4, atol=1e-4)


@every_format
def test_embedding_equals_the_dense_operation(format_type):
    ids = torch.tensor([[0, 49, 7], [3, 3, 1]])
    for setting in settings(format_type, (50, 12)):
        factorization = fitted(setting, (50, 12))
        torch.testing.assert_close(factorization.embedding(ids), F.embedding(ids, factorization.reconstruct()))


@everywhere
@every_format
def test_loading_the_factors_gives_the_same_weight(format_type, shape):
    for setting in settings(format_type, shape):
        first = fitted(setting, shape)
        again = setting.load(shape, dict(first.state_dict()))
        assert torch.equal(again.reconstruct(), first.reconstruct())


@pytest.mark.parametrize("dtype", STORED, ids=str)
@everywhere
@every_format
def test_stored_bytes_are_those_of_the_encoded_factors(format_type, shape, dtype):
    weight = weight_of(shape)
    for setting in settings(format_type, shape):
        factors = {name: factor.to(value_type(dtype)) for name, factor in fitted(setting, shape).state_dict().items()}
        planned = setting.factor_specs(shape, dtype, nonzeros=weight.numel())
        assert factors.keys() == planned.keys()
        specs = {
            name: FactorSpec(tuple(factor.shape), dtype, planned[name].nonzeros and int(torch.count_nonzero(factor)))
            for name, factor in factors.items()
        }
        parts = [part for name, factor in factors.items() for part in cheapest(specs[name]).encode(factor).values()]
        announced = setting.stored_bytes(shape, dtype, weight.numel())
        assert sum(part.nbytes for part in parts) <= announced
        gaps_are_bound = any(cheapest(spec).name == "delta8" for spec in planned.values())
        if format_type.exact_bytes and not gaps_are_bound:
            assert sum(part.nbytes for part in parts) == announced


@pytest.mark.parametrize("dtype", STORED, ids=str)
@everywhere
@every_format
def test_within_fits_the_budget_and_one_step_richer_does_not(format_type, shape, dtype):
    for part in (0.05, 0.3, 0.6, 0.9):
        budget = int(part * math.prod(shape) * dtype.itemsize)
        setting = format_type.within(shape, dtype, budget)
        if setting is None:
            continue
        assert setting.stored_bytes(shape, dtype) <= budget
        richer = setting.richer(shape)
        assert richer is None or richer.stored_bytes(shape, dtype) > budget


@every_format
def test_a_budget_of_nothing_fits_nothing(format_type):
    assert format_type.within((24, 24), torch.float32, 0) is None


def one_step_poorer(setting, weight):
    """The setting with one less in its last size; None where there is nothing to take away."""
    size = getattr(setting, setting.size_option)
    if size is None:  # a rank for each cut: the last was chosen with all others known
        *others, last = setting.ranks
        return dataclasses.replace(setting, ranks=(*others, last - 1)) if last > 1 else None
    smaller = size - 1 if isinstance(size, int) else size - 1 / weight.numel()
    return dataclasses.replace(setting, **{setting.size_option: smaller}) if smaller > 0 else None


def searches():
    """Yield every format, shape and error; of CP, whose searches take a second each, one error a shape in turn."""
    for number, (shape_name, shape) in enumerate(SHAPES.items()):
        for name, format_type in FORMATS.items():
            for place, relative_error in enumerate((0.5, 0.1, 0.01)):
                is_slow = name == "cp" and place != number % 3
                marks = [pytest.mark.slow] if is_slow else []
                yield pytest.param(
                    format_type, shape, relative_error, marks=marks, id=f"{relative_error}-{name}-{shape_name}"
                )


@pytest.mark.parametrize(("format_type", "shape", "relative_error"), list(searches()))
def test_reaching_is_the_smallest_setting_within_the_error(format_type, shape, relative_error):
    weight = weight_of(shape)
    setting = format_type.reaching(weight, relative_error)
    assert error(weight, setting.fit(weight)) <= relative_error + 1e-6
    if format_type.name in SEARCHED:
        return
    poorer = one_step_poorer(setting, weight)
    assert poorer is None or error(weight, poorer.fit(weight)) > relative_error - 1e-6


@everywhere
@every_format
def test_json_and_back_is_the_same_format(format_type, shape):
    for setting in settings(format_type, shape):
        assert from_dict(to_dict(setting)) == setting
        name, options = parse(str(setting))
        assert make(name, options) == setting


@everywhere
@every_format
def test_fitting_twice_gives_equal_factors_and_leaves_the_weight_alone(format_type, shape):
    weight = weight_of(shape)
    before = weight.clone()
    for setting in settings(format_type, shape):
        first, second = fitted(setting, shape).state_dict(), setting.fit(weight).state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(weight, before)


@every_format
def test_a_sweep_gives_what_single_fits_give(format_type):
    weight = weight_of((40, 30))
    wanted = settings(format_type, (40, 30))
    for setting, swept in zip(wanted, format_type.sweep(weight, wanted), strict=True):
        torch.testing.assert_close(swept.reconstruct(), fitted(setting, (40, 30)).reconstruct(), rtol=1e-4, atol=1e-4)


@every_format
def test_gradients_reach_every_factor(format_type):
    factorization = settings(format_type, (24, 20))[0].fit(weight_of((24, 20)))
    factorization.linear(weight_of((5, 20))).square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in factorization.parameters()
    )


EDGE_CASES = {
    "all zero": torch.zeros(12, 9),
    "constant": torch.full((12, 9), 3.0),
    "rank one": torch.outer(torch.arange(1.0, 13), torch.arange(1.0, 10)),
    "huge": weight_of((12, 9)) * 1e37,
    "tiny": weight_of((12, 9)) * 1e-36,
    "one value": torch.nn.functional.pad(torch.ones(1, 1), (3, 5, 4, 7)),
}


@pytest.mark.parametrize("weight", EDGE_CASES.values(), ids=EDGE_CASES.keys())
@every_format
def test_awkward_weights_give_finite_factors(format_type, weight):
    for setting in [*settings(format_type, tuple(weight.shape)), format_type.reaching(weight, 0.1)]:
        rebuilt = setting.fit(weight).reconstruct()
        assert torch.isfinite(rebuilt).all()
        assert (weight - rebuilt).double().norm() <= weight.double().norm() * (1 + 1e-6)


@every_format
def test_factors_that_do_not_make_the_shape_are_refused(format_type):
    setting = settings(format_type, (24, 20))[0]
    factors = dict(fitted(setting, (24, 20)).state_dict())
    with pytest.raises(FormatError, match=f"^{format_type.name}: "):
        setting.load((24, 21), factors)
    with pytest.raises(FormatError, match=f"^{format_type.name}: has factors"):
        setting.load((24, 20), {**factors, "surplus": torch.ones(1)})


@every_format
def test_unknown_options_are_told_with_those_there_are(format_type):
    with pytest.raises(FormatError, match=f"^{format_type.name}: has no option colour; it has "):
        parse(f"{format_type.name}:colour=blue")


def moments_of(fan_in, seed=5):
    """Second moments of many inputs, of fewer than there are, of inputs of which some are always zero; a diagonal.

    And a block, of which the whole moment holds one after another.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(fan_in, fan_in, generator=generator) * torch.rand(fan_in, generator=generator) ** 2
    many = torch.randn(4 * fan_in, fan_in, generator=generator) @ mixing + 0.2
    dead = many * (torch.arange(fan_in) % 3 != 1)
    full = many.T @ many / len(many)
    few = many[: max(1, fan_in // 2)]
    block = next(size for size in range(max(1, fan_in // 2), 0, -1) if fan_in % size == 0)
    return {
        "full": full,
        "rank-deficient": few.T @ few / len(few),
        "dead inputs": dead.T @ dead / len(dead),
        "diagonal": full.diagonal().clone(),
        "block": full[:block, :block].contiguous(),
    }


def output_error(weight, factorization, gram):
    rest = (weight.double() - factorization.reconstruct().detach().double()).reshape(len(weight), -1)
    whole = gram.diag() if gram.ndim == 1 else torch.block_diag(*[gram] * (rest.shape[1] // len(gram)))
    bent = rest @ whole.double()
    return math.sqrt(max(0.0, float((rest * bent).sum())))


@everywhere
@every_format
def test_knowing_the_input_never_makes_the_error_of_the_output_larger(format_type, shape):
    weight = weight_of(shape)
    setting = settings(format_type, shape)[0]
    plain = fitted(setting, shape)
    for gram in moments_of(weight[0].numel()).values():
        known = gram.clone()
        found = setting.fit(weight, known)
        assert all(bool(factor.isfinite().all()) for factor in found.state_dict().values())
        assert output_error(weight, found, gram) <= output_error(weight, plain, gram) * (1 + 1e-5)
        assert torch.equal(known, gram)
    assert torch.equal(weight, weight_of(shape))


@every_format
def test_fitting_twice_for_an_output_gives_equal_factors_of_the_announced_shapes(format_type):
    shape = (24, 20)
    weight = weight_of(shape)
    gram = moments_of(20)["full"]
    for setting in settings(format_type, shape)[::2]:
        first, second = (setting.fit(weight, gram).state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name, spec in setting.factor_specs(shape, torch.float32).items():
            assert tuple(first[name].shape) == spec.shape
            assert spec.nonzeros is None or int(torch.count_nonzero(first[name])) <= spec.nonzeros


@pytest.mark.parametrize("weight", EDGE_CASES.values(), ids=EDGE_CASES.keys())
@every_format
def test_awkward_weights_are_fitted_for_an_output(format_type, weight):
    setting = settings(format_type, tuple(weight.shape))[0]
    gram = moments_of(weight.shape[1])["dead inputs"]
    plain, found = setting.fit(weight), setting.fit(weight, gram)
    assert torch.isfinite(found.reconstruct()).all()
    assert output_error(weight, found, gram) <= output_error(weight, plain, gram) * (1 + 1e-5)


@every_format
def test_what_is_no_second_moment_of_the_input_is_refused(format_type):
    setting = settings(format_type, (24, 20))[0]
    with pytest.raises(NumericalError, match="second moment"):
        setting.fit(weight_of((24, 20)), torch.eye(24))
