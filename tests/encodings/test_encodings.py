"""The law of every encoding: what comes back is the factor, bit by bit, and it took the bytes that were announced."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from tcompress.encodings import ENCODINGS, FactorSpec, cheapest, cheapest_bytes

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = {
    "square": (16, 16),
    "wide": (5, 40),
    "tall": (40, 5),
    "one row": (1, 33),
    "one column": (33, 1),
    "prime": (13, 17),
    "one value": (1, 1),
    "65536 columns": (1, 65536),
    "65537 columns": (1, 65537),
}
DENSITIES = (0.0, None, 0.05, 0.5, 1.0)  # None: a single value

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS.keys())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.dtype.itemsize])


@lru_cache(maxsize=256)
def factor_of(shape, dtype, density, seed=0):
    """Random bits, so that every kind of NaN, infinity and denormal occurs, zero but for a part of them."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integer)
    values = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integer)
    values[values == 0] = 1
    if density is None:
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen[-1, -1] = True
    else:
        chosen = torch.rand(shape, generator=generator, dtype=torch.float64) < density
    return torch.where(chosen, values, torch.zeros_like(values)).view(dtype)


def spec_of(factor):
    return FactorSpec(tuple(factor.shape), factor.dtype, int((bits(factor) != 0).sum()))


@every_encoding
@every_dtype
@every_shape
def test_decoding_gives_the_factor_back_bit_by_bit(encoding, dtype, shape):
    for density in DENSITIES:
        factor = factor_of(shape, dtype, density)
        decoded = encoding.decode(encoding.encode(factor), shape)
        assert (decoded.dtype, tuple(decoded.shape)) == (dtype, shape)
        assert torch.equal(bits(decoded), bits(factor))


@every_encoding
@every_dtype
@every_shape
def test_the_parts_are_what_was_announced_before_there_was_data(encoding, dtype, shape):
    for density in DENSITIES:
        factor = factor_of(shape, dtype, density)
        planned, real = encoding.parts(spec_of(factor)), encoding.encode(factor)
        assert list(real) == list(planned)
        for name, part in real.items():
            assert (tuple(part.shape), part.dtype) == (planned[name].shape, planned[name].dtype)
            assert part.numel() * part.element_size() == planned[name].nbytes
        assert sum(part.nbytes for part in real.values()) == encoding.nbytes(spec_of(factor))


@every_encoding
@every_dtype
def test_nan_payloads_negative_zero_and_denormals_survive(encoding, dtype):
    info = torch.finfo(dtype)
    quiet, signalling = bits(torch.tensor([math.nan, math.inf], dtype=dtype))
    special = torch.tensor([[-0.0, 0.0, info.max], [info.tiny / 2, -math.inf, 1.0]], dtype=dtype)
    payloads = torch.stack([quiet + 1, signalling + 1, -quiet]).view(dtype)
    factor = torch.cat([special, payloads[None]])
    assert torch.equal(bits(encoding.decode(encoding.encode(factor), (3, 3))), bits(factor))


@every_encoding
def test_a_factor_that_is_no_contiguous_tensor_is_encoded_in_row_major_order(encoding):
    factor = factor_of((7, 11), torch.float32, 0.5).T
    assert torch.equal(bits(encoding.decode(encoding.encode(factor), (11, 7))), bits(factor.contiguous()))


@every_encoding
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_every_factor_comes_back(encoding, rows, columns, dtype, density, seed):
    factor = factor_of((rows, columns), dtype, density, seed)
    assert torch.equal(bits(encoding.decode(encoding.encode(factor), (rows, columns))), bits(factor))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4096),
    columns=st.integers(1, 70_000),
    dtype=st.sampled_from(DTYPES),
    density=st.floats(0, 1),
)
def test_the_cheapest_encoding_is_the_one_that_the_documented_formulas_say(rows, columns, dtype, density):
    size, k = dtype.itemsize, int(density * rows * columns)
    formulas = {
        "dense": rows * columns * size,
        "bitmask": k * size + -(-rows * columns // 8),
        "csr": k * (size + (2 if columns <= 65536 else 4)) + 8 * (rows + 1),
    }
    factor = FactorSpec((rows, columns), dtype, k)
    assert cheapest(factor).name == min(formulas, key=formulas.get)
    assert cheapest_bytes(factor) == min(formulas.values())


@pytest.mark.parametrize(
    ("shape", "nonzeros", "name"),
    [((64, 64), None, "dense"), ((64, 64), 4096, "dense"), ((64, 64), 1000, "bitmask"), ((8, 4096), 3, "csr")],
)
def test_the_cheapest_encoding_of_a_known_factor(shape, nonzeros, name):
    assert cheapest(FactorSpec(shape, torch.float32, nonzeros)).name == name


def test_at_equal_bytes_the_encoding_that_stands_first_is_taken():
    # 8 rows x 4 columns, 31 values of 4 bytes: 31 * 4 + 4 = 128 = 32 * 4.
    factor = FactorSpec((8, 4), torch.float32, 31)
    assert ENCODINGS["bitmask"].nbytes(factor) == ENCODINGS["dense"].nbytes(factor) == 128
    assert cheapest(factor).name == "dense"


def test_a_factor_that_is_no_matrix_is_never_csr():
    factor = FactorSpec((3, 5, 7), torch.float32, 4)
    assert ENCODINGS["csr"].parts(factor) is None
    assert ENCODINGS["csr"].nbytes(factor) is None
    assert cheapest(factor).name == "bitmask"


@every_shape
@pytest.mark.parametrize("density", DENSITIES)
def test_csr_holds_the_arrays_of_scipys_csr_array(shape, density):
    factor = torch.nan_to_num(factor_of(shape, torch.float32, density), nan=1.5)
    # SciPy takes -0.0 for a zero; the encoding keeps it.
    factor = torch.where(factor == 0, torch.zeros(()), factor)
    parts, expected = ENCODINGS["csr"].encode(factor), sparse.csr_array(factor.numpy())
    np.testing.assert_array_equal(parts["values"].numpy(), expected.data)
    np.testing.assert_array_equal(parts["columns"].to(torch.int64).numpy(), expected.indices)
    np.testing.assert_array_equal(parts["row_starts"].numpy(), expected.indptr)


def test_bitmask_sets_the_lowest_bit_first():
    factor = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0, 3.0]])
    parts = ENCODINGS["bitmask"].encode(factor)
    assert parts["mask"].tolist() == [0b00000001, 0b00000011]
    assert parts["values"].tolist() == [1.0, 2.0, 3.0]
