"""Which coding a factor takes: the one with the fewest bytes, by the formulas of the page."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.encodings import ENCODINGS, VALUES, FactorSpec, cheapest, cheapest_bytes, find, measured, value_type
from tests.encodings.factors import CODED, DTYPES, numbers

STORED = (*DTYPES, *CODED.values())


def positions(elements, k):
    """The bits of k positions that stand as they are, and the bytes of these and of the others in unary."""
    found = [low * -(-k // 8) + -(-(k + ((elements - 1) >> low)) // 8) if k else 0 for low in range(34)]
    return found.index(min(found)), min(found)


def costs(shape, dtype, k, skips=None, pattern=None):
    """The bytes of every coding, by its names, in the order of the table."""
    (rows, columns), elements = shape, math.prod(shape)
    low, halves = positions(elements, k)
    gaps = k + ((elements - k) // 255 if k else 0) if skips is None else k + skips
    places = {
        "dense": (elements, 0),
        "bitmask": (k, -(-elements // 8)),
        "delta8": (k, gaps),
        "csr": (k, k * (2 if columns <= 65536 else 4) + 8 * (rows + 1)),
        f"elias-fano:{low}": (k, halves),
    }
    if pattern is not None:
        n, m = pattern
        places[f"{n}:{m}"] = (elements // m * n, -(-elements // m * math.ceil(math.log2(math.comb(m, n))) // 8))
    found = {(name, None): v * value_type(dtype).itemsize + beside for name, (v, beside) in places.items()}
    if dtype == torch.int8:
        found |= {(name, "int8"): v + 4 * rows + beside for name, (v, beside) in places.items()}
    if dtype == torch.int4:
        found |= {(name, "int4"): -(-v // 2) + 2 * -(-v // 32) + beside for name, (v, beside) in places.items()}
    if dtype == torch.int3:
        bytes3 = {name: 3 * -(-v // 8) + 2 * -(-v // 32) + 2 + beside for name, (v, beside) in places.items()}
        found |= {(name, "int3"): nbytes for name, nbytes in bytes3.items()}
    return found


@settings(max_examples=300, deadline=None)
@given(
    rows=st.integers(0, 4096),
    columns=st.integers(0, 70_000),
    dtype=st.sampled_from(STORED),
    density=st.floats(0, 1) | st.floats(0, 0.01),
    pattern=st.sampled_from([None, (2, 4), (7, 8), (1, 16)]),
)
def test_the_cheapest_coding_is_the_one_that_the_documented_formulas_say(rows, columns, dtype, density, pattern):
    if pattern is not None:
        columns -= columns % pattern[1]
    k = int(density * rows * columns)
    factor = FactorSpec((rows, columns), dtype, k, pattern=pattern)
    expected, found = costs((rows, columns), dtype, k, pattern=pattern), cheapest(factor)
    assert (found.name, found.values) == min(expected, key=expected.get)
    assert cheapest_bytes(factor) == min(expected.values()) == found.nbytes(factor)


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 64), columns=st.integers(1, 300), dtype=st.sampled_from(STORED), data=st.data())
def test_more_values_never_take_fewer_bytes(rows, columns, dtype, data):
    k = data.draw(st.integers(0, rows * columns - 1))
    fewer, more = (FactorSpec((rows, columns), dtype, kept) for kept in (k, k + 1))
    assert cheapest_bytes(fewer) <= cheapest_bytes(more)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 64),
    columns=st.integers(1, 300),
    dtype=st.sampled_from(STORED),
    density=st.floats(0, 1) | st.floats(0, 0.01),
    seed=st.integers(0, 99),
)
def test_bytes_before_the_fit_are_a_bound_and_exact_once_the_factor_is_measured(rows, columns, dtype, density, seed):
    factor = numbers((rows, columns), density, seed).to(value_type(dtype))
    known = measured(factor, dtype)
    unknown = FactorSpec(known.shape, dtype, known.nonzeros)
    nbytes = sum(part.nbytes for part in cheapest(known).encode(factor).values())
    assert nbytes == cheapest_bytes(known) <= cheapest_bytes(unknown)
    if cheapest(unknown).name != "delta8" and known.pattern is None:
        assert cheapest_bytes(replace(known, skips=None)) == cheapest_bytes(unknown)


@pytest.mark.parametrize(
    ("shape", "dtype", "nonzeros", "names"),
    [
        ((64, 64), torch.float32, None, ("dense", None)),
        ((64, 64), torch.float32, 4096, ("dense", None)),
        ((64, 64), torch.float32, 1100, ("bitmask", None)),
        ((64, 64), torch.float32, 1000, ("elias-fano:2", None)),
        ((64, 64), torch.float32, 100, ("elias-fano:5", None)),
        ((64, 64), torch.float32, 0, ("delta8", None)),
        ((8, 4096), torch.float32, 3, ("elias-fano:11", None)),
        ((64, 64), torch.int8, None, ("dense", "int8")),
        ((64, 64), torch.int4, 1100, ("bitmask", "int4")),
        ((64, 1), torch.int8, None, ("dense", None)),
        ((64,), torch.int8, None, ("dense", None)),
        ((64,), torch.int4, None, ("dense", None)),
        ((4, 4, 64), torch.int4, 80, ("elias-fano:3", "int4")),
        ((3, 5, 7), torch.float32, 40, ("bitmask", None)),
    ],
)
def test_the_cheapest_coding_of_a_known_factor(shape, dtype, nonzeros, names):
    found = cheapest(FactorSpec(shape, dtype, nonzeros))
    assert (found.name, found.values) == names


def test_gaps_are_taken_where_there_are_few_skips_in_a_thin_factor():
    assert cheapest(FactorSpec((512, 512), torch.float32, 2000)).name == "elias-fano:7"  # what is known is a bound
    assert cheapest(FactorSpec((512, 512), torch.float32, 2000, skips=100)).name == "delta8"


def test_at_equal_bytes_values_as_they_are_and_the_encoding_that_stands_first_are_taken():
    # 8 rows x 4 columns, 31 values of 4 bytes: 31 * 4 + 4 = 128 = 32 * 4.
    factor = FactorSpec((8, 4), torch.float32, 31)
    assert find("bitmask").nbytes(factor) == find("dense").nbytes(factor) == 128
    assert cheapest(factor).name == "dense"
    # Rows of one value: a code and its scale would take 5 bytes, of four values 8 against 16.
    assert cheapest(FactorSpec((4, 1), torch.int8)).values is None
    assert cheapest(FactorSpec((4, 4), torch.int8)).values == "int8"


def test_at_equal_bytes_places_stand_before_a_pattern():
    factor = FactorSpec((2, 136), torch.float32, 64, pattern=(1, 4))
    assert find("elias-fano:1").nbytes(factor) == find("1:4").nbytes(factor) == 289
    assert cheapest(factor).name == "elias-fano:1"


def test_a_factor_that_is_no_matrix_is_never_csr():
    factor = FactorSpec((3, 5, 7), torch.float32, 4)
    assert find("csr").parts(factor) is None
    assert find("csr").nbytes(factor) is None


def test_every_pair_of_names_is_found_and_nothing_else():
    for name in (*ENCODINGS, "elias-fano:0", "elias-fano:48", "1:2", "2:4", "15:16"):
        for values in VALUES:
            found = find(name, values)
            assert (found.name, found.values) == (name, values)
    for name in (
        "",
        "zip",
        "4:2",
        "4:4",
        "0:4",
        "2:17",
        "02:4",
        "2:4 ",
        "2:4\n",
        "-1:4",
        "2:4:8",
        "elias-fano",
        "elias-fano:49",
        "elias-fano:03",
        "elias-fano:",
        "²:4",
        "٢:٤",
    ):
        assert find(name) is None
    for values in ("", "int2", "plain", "float32"):
        assert find("dense", values) is None


def test_codings_are_equal_when_their_names_are():
    names = ("dense", "elias-fano:1", "elias-fano:2", "1:2", "1:4")
    for one, other in itertools.product(itertools.product(names, VALUES), repeat=2):
        assert (find(*one) == find(*other)) == (one == other)


@pytest.mark.parametrize(
    ("pattern", "kept"), [((2, 4), (0, 3)), ((1, 8), (5,)), ((3, 16), (1, 2, 15)), ((3, 4), (0, 1, 2))]
)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_pattern_is_measured(pattern, kept, dtype):
    factor = torch.zeros(64, 6, pattern[1])
    factor[:, :, list(kept)] = 1.0
    known = measured(factor.reshape(64, -1).to(value_type(dtype)), dtype)
    assert known.nonzeros == 64 * 6 * len(kept)
    assert known.pattern == pattern
    assert cheapest(known).name == f"{pattern[0]}:{pattern[1]}"


def test_no_pattern_is_measured_where_there_is_none_or_it_does_not_help():
    assert measured(numbers((64, 64), 0.5), torch.float32).pattern is None
    assert measured(torch.ones(64, 64), torch.float32).pattern is None
    assert measured(torch.zeros(64, 64), torch.float32).pattern is None
    odd = torch.zeros(64, 63)
    odd[:, ::3] = 1.0
    assert measured(odd, torch.float32).pattern is None


def test_values_that_the_stored_type_rounds_to_zero_are_not_counted():
    factor = torch.tensor([[1.0, 1e-30, 0.0], [0.0, -0.0, 2.0]])
    assert measured(factor, torch.float32).nonzeros == 4
    assert measured(factor, torch.float16).nonzeros == 3
