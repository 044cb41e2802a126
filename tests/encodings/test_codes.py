"""int8, int4 and int3: what comes back is near the factor, and is what a second look at the same parts gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tcompress.encodings import FactorSpec, cheapest, measured
from tcompress.errors import NumericalError
from tests.encodings.factors import (
    CODED,
    DENSITIES,
    NAMES,
    SHAPES,
    coding_of,
    holds,
    is_pattern,
    numbers,
    spec_of,
    thinned,
)

every_name = pytest.mark.parametrize("name", NAMES)
every_code = pytest.mark.parametrize("values", CODED)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def factors_for(name, shape):
    for density in DENSITIES:
        factor = numbers(shape, density)
        factor = thinned(factor, name) if is_pattern(name) else factor
        if holds(factor, name):
            yield factor


def at_stored_places(tensor, factor, name):
    """The values of a tensor at the places that are stored of a factor, in their order, by the page."""
    if is_pattern(name):
        n, m = map(int, name.split(":"))
        # The nonzeros first, then the lowest of the others; and all of these in the order of the row.
        ranks = torch.where(factor.reshape(-1, m) != 0, 0, 1) * m + torch.arange(m)
        places = ranks.argsort(dim=1)[:, :n].sort(dim=1).values
        return tensor.reshape(-1, m).gather(1, places).reshape(-1).numpy()
    return tensor.reshape(-1).numpy() if name == "dense" else tensor[factor != 0].numpy()


@every_name
@every_code
@every_shape
def test_the_parts_are_what_was_announced_and_give_a_factor_in_float32(name, values, shape):
    coding = coding_of(name, values)
    for factor in factors_for(name, shape):
        spec = spec_of(factor, CODED[values], name)
        planned, parts = coding.parts(spec), coding.encode(factor)
        assert tuple(parts) == tuple(planned) == coding.part_names
        for part, tensor in parts.items():
            assert (tuple(tensor.shape), tensor.dtype) == (planned[part].shape, planned[part].dtype)
        assert sum(tensor.nbytes for tensor in parts.values()) == coding.nbytes(spec)
        decoded = coding.decode(parts, shape)
        assert (decoded.dtype, tuple(decoded.shape)) == (torch.float32, shape)
        assert not decoded[factor == 0].any()


@every_name
@every_shape
def test_int8_rounds_each_value_to_the_nearest_of_its_row(name, shape):
    coding = coding_of(name, "int8")
    for factor in factors_for(name, shape):
        parts = coding.encode(factor)
        rows = factor.numpy()
        scale = (np.abs(rows).max(axis=1, initial=0) / np.float32(127)).astype(np.float32)
        np.testing.assert_array_equal(parts["scale"].numpy(), scale)
        wide = np.where(scale > 0, scale, 1)[:, None]
        expected = np.rint(rows / wide).astype(np.float32) * scale[:, None]
        found = coding.decode(parts, shape).numpy()
        np.testing.assert_array_equal(found, expected)
        assert (np.abs(found - rows) <= scale[:, None] * 0.5001).all()


@every_name
@every_shape
def test_int4_values_are_codes_times_the_scale_of_32_stored_ones(name, shape):
    coding = coding_of(name, "int4")
    for factor in factors_for(name, shape):
        parts, stored = coding.encode(factor), at_stored_places(factor, factor, name)
        halves = [half for byte in parts["codes"].tolist() for half in (byte & 15, byte >> 4)]
        assert not any(halves[stored.size :])
        codes = np.array([half - 16 if half > 7 else half for half in halves[: stored.size]], np.float32)
        scale = np.repeat(parts["scale"].numpy().astype(np.float32), 32)[: stored.size]
        found = at_stored_places(coding.decode(parts, shape), factor, name)
        np.testing.assert_array_equal(found, codes * scale)
        # To the nearest code, clipped at -8 and 7.
        wanted = np.clip(stored / np.where(scale == 0, np.inf, scale), -8, 7)
        assert (np.abs(codes - wanted) <= 0.5001).all()


@every_name
@every_shape
def test_int3_values_are_signed_levels_of_one_offset_times_the_scale_of_32_stored_ones(name, shape):
    coding = coding_of(name, "int3")
    for factor in factors_for(name, shape):
        parts, stored = coding.encode(factor), at_stored_places(factor, factor, name)
        assert not np.unpackbits(parts["codes"].numpy(), axis=1, bitorder="little")[:, stored.size :].any()
        sign, low, high = np.unpackbits(parts["codes"].numpy(), axis=1, bitorder="little")[:, : stored.size]
        offset = parts["scale"].numpy()[0].astype(np.float32)
        levels = (low + 2 * high + offset) * np.where(sign, np.float32(-1), np.float32(1))
        scale = np.repeat(parts["scale"].numpy()[1:].astype(np.float32), 32)[: stored.size]
        found = at_stored_places(coding.decode(parts, shape), factor, name)
        np.testing.assert_array_equal(found, levels * scale)
        # To the nearest level of the same sign.
        count = np.clip(np.abs(stored) / np.where(scale == 0, np.inf, scale), offset, offset + 3)
        assert (np.abs(np.abs(levels) - count) <= 0.5001).all()
        assert (np.signbit(found) == np.signbit(stored))[found != 0].all()


@settings(max_examples=100, deadline=None)
@given(
    count=st.integers(1, 3000),
    least=st.floats(0, 2),
    power=st.sampled_from([0.3, 1.0, 3.0]),
    size=st.sampled_from([1e-2, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_what_int3_gives_back_it_gives_back_again_bit_by_bit(count, least, power, size, seed):
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    values = size * values.sign() * (values.abs() ** power + least)
    coding = coding_of("dense", "int3")
    once = coding.decode(coding.encode(values[None]), (1, count))
    assert torch.equal(coding.decode(coding.encode(once), (1, count)), once)


@pytest.mark.parametrize(("density", "offset", "error"), [(1.0, 0.5, 0.031), (0.446, 2.0, 0.0094), (0.15, 4.0, 0.0025)])
def test_int3_spends_no_codes_where_pruning_left_nothing(density, offset, error):
    """Errors over the whole factor's square, of normal values: one more bit for each is worth less than that."""
    factor = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    kept = torch.where(factor.abs() >= factor.abs().flatten().quantile(1 - density), factor, 0)
    coding = coding_of("dense" if density == 1 else "bitmask", "int3")
    parts = coding.encode(kept)
    assert float(parts["scale"][0]) == offset
    assert float((coding.decode(parts, (256, 512)) - kept).square().sum() / factor.square().sum()) < error


@pytest.mark.parametrize(
    ("shape", "zeros", "offset"),
    [
        ((64, 512), 1, 0.5),
        ((64, 512), 32, 0.5),
        ((64, 512), 33, 0.0),
        ((20, 100), 2, 0.5),
        ((20, 100), 3, 0.0),
        ((8, 126), 1, 0.5),  # the last group, of 16 values, is filled up by them: the zero is still one
    ],
)
def test_int3_does_not_lose_its_best_grid_to_one_zero_in_a_thousand(shape, zeros, offset):
    factor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    factor.view(-1)[-zeros:] = 0
    assert float(coding_of("dense", "int3").encode(factor)["scale"][0]) == offset


def test_the_offset_of_int3_is_chosen_by_all_of_a_factor():
    normal = torch.randn(32, 512, generator=torch.Generator().manual_seed(0))
    far = normal.sign() * (normal.abs() + 2)
    coding = coding_of("dense", "int3")
    factors = [torch.cat(halves) for halves in ([normal], [normal, far], [far, normal], [far])]
    offsets = [float(coding.encode(factor)["scale"][0]) for factor in factors]
    assert offsets[0] < min(offsets[1:3])
    assert max(offsets[1:3]) < offsets[3]


def test_zeros_that_int3_stores_stay_zeros_where_there_are_some():
    factor = numbers((20, 40), 1.0)
    factor[3, 5] = 0
    coding = coding_of("dense", "int3")
    parts = coding.encode(factor)
    assert float(parts["scale"][0]) == 0
    assert torch.equal(coding.decode(parts, (20, 40))[3, 5], torch.tensor(0.0))


@settings(max_examples=150, deadline=None)
@given(
    count=st.integers(1, 200),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
    power=st.sampled_from([0.3, 1.0, 3.0]),
    seed=st.integers(0, 999),
)
def test_int4_is_no_worse_than_scales_of_the_largest_magnitude(count, size, power, seed):
    """Plain rounding with absmax / 7, and with the signed extreme / -8, group by group."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    values = size * values.sign() * values.abs() ** power
    assume(float(values.abs().max()) > 1e-6)  # below this no scale in fp16 holds them
    coding = coding_of("dense", "int4")
    found = coding.decode(coding.encode(values[None]), (1, count))[0]
    for start in range(0, count, 32):
        group = values[start : start + 32]
        extreme = group[group.abs().argmax()]
        error = (found[start : start + 32] - group).square().sum()
        for exact in (extreme / -8, extreme.abs() / 7):
            scale = exact.half().float()
            if scale == 0:
                continue
            plain = (group / scale).round().clamp(-8, 7) * scale
            assert error <= (plain - group).square().sum() * (1 + 1e-5)


@every_code
def test_normal_values_lose_as_little_as_their_bits_allow(values):
    factor = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    coding = coding_of("dense", values)
    error = (coding.decode(coding.encode(factor), (512, 768)) - factor).norm() / factor.norm()
    assert error < {"int8": 0.0077, "int4": 0.0814, "int3": 0.1718}[values]


@every_code
@pytest.mark.parametrize("name", ["dense", "bitmask", "2:4"])
def test_the_same_factor_gives_the_same_parts(name, values):
    factor = thinned(numbers((200, 400), 1.0), "2:4")
    one, two = (coding_of(name, values).encode(factor) for _ in range(2))
    assert all(torch.equal(one[part], two[part]) for part in one)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 90), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_what_int8_gives_back_it_gives_back_again(rows, columns, density, seed):
    coding = coding_of("dense", "int8")
    once = coding.decode(coding.encode(numbers((rows, columns), density, seed)), (rows, columns))
    twice = coding.decode(coding.encode(once), (rows, columns))
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


@every_name
@every_code
@every_shape
def test_the_codes_that_values_stand_at_give_them_again(name, values, shape):
    coding = coding_of(name, values)
    for factor in factors_for(name, shape):
        parts = coding.encode(factor)
        found, steps = coding.decode(parts, shape), coding.steps(parts, shape)
        codes = coding.levels(parts).codes(torch.where(steps == 0, 0, found / steps))
        assert torch.equal(coding.decode(coding.recoded(parts, codes), shape), found)


@pytest.mark.parametrize(("values", "largest", "others"), [("int3", 3.5, 1.0), ("int4", 7.0, 1.5)])
def test_scales_of_groups_with_one_large_value_are_found_again(values, largest, others):
    """There the scale of least error would be one at which the large value is no more the largest code."""
    factor = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    factor[:, :32] = torch.linspace(0.5, others, 64)[:, None]
    factor[:, 0] = largest
    coding = coding_of("dense", values)
    once = coding.decode(coding.encode(factor), (64, 512))
    assert torch.equal(coding.decode(coding.encode(once), (64, 512)), once)


@every_code
def test_all_zero_factors_have_scales_of_zero(values):
    parts = coding_of("dense", values).encode(torch.zeros(3, 50))
    assert not parts["scale"].any()
    assert not parts["codes"].any()
    assert not coding_of("dense", values).decode(parts, (3, 50)).any()


def test_values_out_of_the_range_of_scales_are_refused_in_one_line():
    int3, int4, int8 = (coding_of("dense", values) for values in ("int3", "int4", "int8"))
    with pytest.raises(NumericalError, match=r"^its values are too large for int3's fp16 scales; int8 has float32"):
        int3.encode(torch.full((2, 40), 1e6))
    with pytest.raises(NumericalError, match=r"^its values are too small for int3's fp16 scales; int8 has float32"):
        int3.encode(torch.full((2, 40), 1e-9))
    with pytest.raises(NumericalError, match=r"^its values are too large for int4's fp16 scales; int8 has float32"):
        int4.encode(torch.full((2, 40), 1e6))
    with pytest.raises(NumericalError, match=r"^its values are too small for int4's fp16 scales; int8 has float32"):
        int4.encode(torch.full((2, 40), 1e-9))
    with pytest.raises(NumericalError, match=r"^its values are too small for int8's fp32 scales"):
        int8.encode(torch.full((2, 40), 1e-45))
    for size in (1e6, 1e-9):
        assert int8.decode(int8.encode(torch.full((2, 40), size)), (2, 40))[0, 0] == pytest.approx(size)
    mixed = torch.cat([torch.full((1, 32), 1e-9), torch.ones(1, 32)])
    assert int4.decode(int4.encode(mixed), (2, 32))[1, 0] == pytest.approx(1, rel=1e-3)


@every_code
def test_vectors_and_rows_of_one_value_stay_as_they_are(values):
    for shape in ((40,), (40, 1) if values == "int8" else (1,), ()):
        factor = torch.ones(shape)
        for spec in (FactorSpec(shape, CODED[values]), measured(factor, CODED[values])):
            coding = cheapest(spec)
            assert coding.values is None
            assert torch.equal(coding.decode(coding.encode(factor), shape), factor)
