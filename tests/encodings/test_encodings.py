"""The law of every support: what comes back is the factor, bit by bit, and it took the bytes that were announced."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tests.encodings.factors import (
    DENSITIES,
    DTYPES,
    NAMES,
    SHAPES,
    bits,
    coding_of,
    holds,
    is_pattern,
    random_bits,
    spec_of,
    thinned,
)

every_name = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def factors_for(name, shape, dtype):
    for density in DENSITIES:
        factor = random_bits(shape, dtype, density)
        factor = thinned(factor, name) if is_pattern(name) else factor
        if holds(factor, name):
            yield factor


@every_name
@every_dtype
@every_shape
def test_decoding_gives_the_factor_back_bit_by_bit(name, dtype, shape):
    coding = coding_of(name)
    for factor in factors_for(name, shape, dtype):
        decoded = coding.decode(coding.encode(factor), shape)
        assert (decoded.dtype, tuple(decoded.shape)) == (dtype, shape)
        assert torch.equal(bits(decoded), bits(factor))


@every_name
@every_dtype
@every_shape
def test_the_parts_are_what_was_announced_before_there_was_data(name, dtype, shape):
    coding = coding_of(name)
    for factor in factors_for(name, shape, dtype):
        spec = spec_of(factor, dtype, name)
        planned, real = coding.parts(spec), coding.encode(factor)
        assert tuple(real) == tuple(planned) == coding.part_names
        for part, tensor in real.items():
            assert (tuple(tensor.shape), tensor.dtype) == (planned[part].shape, planned[part].dtype)
        assert sum(tensor.nbytes for tensor in real.values()) == coding.nbytes(spec)


@every_name
@every_dtype
def test_nan_payloads_negative_zero_and_denormals_survive(name, dtype):
    info = torch.finfo(dtype)
    quiet, signalling = bits(torch.tensor([math.nan, math.inf], dtype=dtype))
    special = torch.tensor([-0.0, 0.0, info.max, info.tiny / 2, -math.inf, 1.0], dtype=dtype)
    payloads = torch.stack([quiet + 1, signalling + 1, -quiet]).view(dtype)
    factor = torch.zeros(16, 80, dtype=dtype)  # one in each group of every width
    factor[:9, 0] = torch.cat([special, payloads])
    coding = coding_of(name)
    assert torch.equal(bits(coding.decode(coding.encode(factor), (16, 80))), bits(factor))


@every_name
def test_a_factor_that_is_no_contiguous_tensor_is_encoded_in_row_major_order(name):
    factor = random_bits((7, 80), torch.float32, 0.05).T.contiguous().T
    factor = thinned(factor, name) if is_pattern(name) else factor
    factor = factor.T.contiguous().T
    assert not factor.is_contiguous()
    coding = coding_of(name)
    assert torch.equal(bits(coding.decode(coding.encode(factor), (7, 80))), bits(factor.contiguous()))


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([name for name in NAMES if not is_pattern(name)]),
    sizes=st.lists(st.integers(0, 12), min_size=2, max_size=4),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_factor_comes_back(name, sizes, dtype, density, seed):
    sizes = sizes[:2] if name == "csr" else sizes
    factor, coding = random_bits(tuple(sizes), dtype, density, seed), coding_of(name)
    assert torch.equal(bits(coding.decode(coding.encode(factor), tuple(sizes))), bits(factor))


@settings(max_examples=200, deadline=None)
@given(
    m=st.integers(2, 16),
    n=st.integers(1, 15),
    rows=st.integers(0, 12),
    groups=st.integers(0, 12),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_patterned_factor_comes_back(m, n, rows, groups, density, seed):
    name, shape = f"{min(n, m - 1)}:{m}", (rows, groups * m)
    factor, coding = thinned(random_bits(shape, torch.bfloat16, density, seed), name), coding_of(name)
    parts = coding.encode(factor)
    assert torch.equal(bits(coding.decode(parts, shape)), bits(factor))
    assert sum(part.nbytes for part in parts.values()) == coding.nbytes(spec_of(factor, torch.bfloat16, name))


@pytest.mark.parametrize("name", ["bitmask", "delta8", "csr", "15:16"])
@pytest.mark.parametrize("density", [0.002, 0.6])
def test_a_factor_of_many_blocks_comes_back(name, density):
    factor = random_bits((1024, 1552), torch.bfloat16, density)
    factor = thinned(factor, name) if is_pattern(name) else factor
    coding = coding_of(name)
    assert torch.equal(bits(coding.decode(coding.encode(factor), (1024, 1552))), bits(factor))


@every_shape
@pytest.mark.parametrize("density", DENSITIES)
def test_csr_holds_the_arrays_of_scipys_csr_array(shape, density):
    factor = torch.nan_to_num(random_bits(shape, torch.float32, density), nan=1.5)
    # SciPy takes -0.0 for a zero; the encoding keeps it.
    factor = torch.where(factor == 0, torch.zeros(()), factor)
    parts, expected = coding_of("csr").encode(factor), sparse.csr_array(factor.numpy())
    np.testing.assert_array_equal(parts["values"].numpy(), expected.data)
    np.testing.assert_array_equal(parts["columns"].to(torch.int64).numpy(), expected.indices)
    np.testing.assert_array_equal(parts["row_starts"].numpy(), expected.indptr)


def test_bitmask_sets_the_lowest_bit_first():
    factor = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0, 3.0]])
    parts = coding_of("bitmask").encode(factor)
    assert parts["mask"].tolist() == [0b00000001, 0b00000011]
    assert parts["values"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("positions", "gaps"),
    [
        ([], []),
        ([0, 1, 3], [0, 0, 1]),
        ([254, 255], [254, 0]),
        ([255], [255, 0]),
        ([256, 511, 1023], [255, 1, 254, 255, 255, 1]),
        ([1023], [255, 255, 255, 255, 3]),
    ],
)
def test_delta8_counts_the_zeros_before_each_value_in_bytes(positions, gaps):
    factor = torch.zeros(4, 256)
    factor.view(-1)[positions] = 2.0
    parts = coding_of("delta8").encode(factor)
    assert parts["gaps"].tolist() == gaps
    assert parts["values"].tolist() == [2.0] * len(positions)
    assert torch.equal(coding_of("delta8").decode(parts, (4, 256)), factor)


def test_patterns_are_numbered_as_itertools_numbers_them_and_packed_lowest_bit_first():
    patterns = list(itertools.combinations(range(4), 2))
    factor = torch.zeros(2, 12)
    for group, pattern in enumerate(patterns):
        factor.view(6, 4)[group, list(pattern)] = torch.tensor([2.0 * group + 1, 2.0 * group + 2])
    parts = coding_of("2:4").encode(factor)
    assert parts["values"].tolist() == list(range(1, 13))
    packed = sum(number << 3 * number for number in range(6))
    assert bytes(parts["patterns"].tolist()) == packed.to_bytes(3, "little")


def test_a_group_with_room_left_stores_zeros_at_its_lowest_positions():
    factor = torch.tensor([[0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0]])
    parts = coding_of("2:4").encode(factor)
    assert parts["values"].tolist() == [0, 5, 0, 0, 7, 0]
    patterns = list(itertools.combinations(range(4), 2))
    numbers = [patterns.index(pair) for pair in ((0, 3), (0, 1), (0, 1))]
    assert parts["patterns"].tolist() == [numbers[0] | numbers[1] << 3 | (numbers[2] << 6 & 255), numbers[2] >> 2]
