"""Parts that a stranger wrote: whatever contradicts itself or the shape is refused, nothing is guessed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.errors import InputError
from tests.encodings.factors import coding_of

FACTOR = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0]])
BITMASK, CSR, DENSE = coding_of("bitmask"), coding_of("csr"), coding_of("dense")
HUGE = 2**63 - 1

STARTS = "has row starts that do not rise from 0 to the number of its columns"
OUTSIDE = "has column numbers outside 0 to 3"
TYPE = "has column numbers that are not torch.uint16"
ORDER = "has column numbers that do not rise within a row"
LIST = "has column numbers that are no plain list"


def refusal(encoding, parts, shape=(3, 4)):
    with pytest.raises(InputError) as caught:
        encoding.decode(parts, shape)
    return str(caught.value)


def csr(**changed):
    """The parts of FACTOR: columns 1 3 | | 0 2, rows start at 0 2 2 4."""
    return {**CSR.encode(FACTOR), **changed}


def short(*columns):
    return torch.tensor(columns).to(torch.uint16)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"row_starts": torch.tensor([0, 3, 2, 4])}, STARTS),
        ({"row_starts": torch.tensor([1, 2, 2, 4])}, STARTS),
        ({"row_starts": torch.tensor([-1, 2, 2, 4])}, STARTS),
        ({"row_starts": torch.tensor([0, 2, 2, 3])}, STARTS),
        ({"row_starts": torch.tensor([0, 2, 2, 5])}, STARTS),
        ({"row_starts": torch.tensor([0, HUGE, -2, 4])}, STARTS),
        ({"row_starts": torch.tensor([0, -HUGE - 1, HUGE, 4])}, STARTS),
        ({"row_starts": torch.tensor([0, 2, 4])}, "has not 4 row starts"),
        ({"row_starts": torch.tensor([0, 2, 2, 2, 4])}, "has not 4 row starts"),
        ({"row_starts": torch.tensor([[0, 2, 2, 4]])}, "has not 4 row starts"),
        ({"row_starts": torch.tensor(0)}, "has not 4 row starts"),
        ({"row_starts": torch.tensor([0, 2, 2, 4], dtype=torch.int32)}, "has not 4 row starts"),
        ({"row_starts": torch.tensor([0.0, 2, 2, 4])}, "has not 4 row starts"),
        ({"columns": short(1, 4, 0, 2)}, OUTSIDE),
        ({"columns": short(1, 65535, 0, 2)}, OUTSIDE),
        ({"columns": short(1, 1, 0, 2)}, ORDER),
        ({"columns": short(3, 1, 0, 2)}, ORDER),
        ({"columns": short(1, 3, 2, 2)}, ORDER),
        ({"columns": short(1, 3, 0)}, STARTS),
        ({"columns": short(1, 3, 0, 2)[None]}, LIST),
        ({"values": torch.ones(3)}, "has values of shape (3,) for places of (4,)"),
        ({"values": torch.ones(2, 2)}, "has values of shape (2, 2) for places of (4,)"),
        ({"values": torch.tensor(1.0), "columns": short(1)[0]}, LIST),
        ({"columns": torch.tensor([1.0, 3, 0, 2])}, TYPE),
        ({"columns": torch.tensor([1.0, 3, 0, 2], dtype=torch.complex64)}, TYPE),
        ({"columns": torch.tensor([1, 3, 0, 2], dtype=torch.int32)}, TYPE),
        ({"columns": torch.tensor([1, -3, 0, 2])}, TYPE),
        ({"columns": torch.tensor([True, True, False, True])}, TYPE),
    ],
)
def test_csr_parts_that_contradict_each_other_are_refused(changed, problem):
    assert refusal(CSR, csr(**changed)) == problem


def test_wide_csr_takes_only_int32_columns_inside_the_factor():
    shape, starts = (1, 65537), torch.tensor([0, 1])
    parts = {"values": torch.ones(1), "row_starts": starts}
    right = CSR.decode({**parts, "columns": torch.tensor([65536], dtype=torch.int32)}, shape)
    assert right.nonzero().tolist() == [[0, 65536]]
    problem = "has column numbers that are not torch.int32"
    assert refusal(CSR, {**parts, "columns": short(3)}, shape) == problem
    for column in (-1, 65537, 2**31 - 1):
        negative = {**parts, "columns": torch.tensor([column], dtype=torch.int32)}
        assert refusal(CSR, negative, shape) == "has column numbers outside 0 to 65536"


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((12,), "is csr, but its shape (12,) is no matrix"),
        ((3, 2, 2), "is csr, but its shape (3, 2, 2) is no matrix"),
        ((), "is csr, but its shape () is no matrix"),
        ((4, 3), "has not 5 row starts"),
        ((2, 6), "has not 3 row starts"),
        ((0, 0), "has not 1 row starts"),
        ((3, 3), "has column numbers outside 0 to 2"),
        ((3, 65537), "has column numbers that are not torch.int32"),
    ],
)
def test_csr_of_another_shape_is_refused(shape, problem):
    assert refusal(CSR, csr(), shape) == problem


def bitmask(**changed):
    """The parts of FACTOR: bits 1, 3, 8 and 10 of twelve."""
    return {**BITMASK.encode(FACTOR), **changed}


def mask(*numbers, dtype=torch.uint8):
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"mask": mask(0b1010, 0b0001)}, "has values of shape (4,) for places of (3,)"),
        ({"mask": mask(0b1011, 0b0101)}, "has values of shape (4,) for places of (5,)"),
        ({"mask": mask(0b1010, 0b1_0101)}, "has bits beyond its last element"),
        ({"mask": mask(0b1010, 0b1000_0001)}, "has bits beyond its last element"),
        ({"mask": mask(0b1010)}, "has no bit for each of (3, 4)"),
        ({"mask": mask(0b1010, 0b0101, 0)}, "has no bit for each of (3, 4)"),
        ({"mask": mask(0b1010, 0b0101)[None]}, "has no bit for each of (3, 4)"),
        ({"mask": mask(0b1010, 0b0101, dtype=torch.int8)}, "has no bit for each of (3, 4)"),
        ({"mask": mask(1, 1, dtype=torch.bool)}, "has no bit for each of (3, 4)"),
        ({"mask": mask(10, 5, dtype=torch.float32)}, "has no bit for each of (3, 4)"),
        ({"values": torch.ones(3)}, "has values of shape (3,) for places of (4,)"),
        ({"values": torch.ones(5)}, "has values of shape (5,) for places of (4,)"),
        ({"values": torch.ones(2, 2)}, "has values of shape (2, 2) for places of (4,)"),
        ({"values": torch.tensor(1.0), "mask": mask(1, 0)}, "has values of shape () for places of (1,)"),
    ],
)
def test_bitmask_parts_that_contradict_each_other_are_refused(changed, problem):
    assert refusal(BITMASK, bitmask(**changed)) == problem


@pytest.mark.parametrize("shape", [(3, 6), (1, 4), (), (0, 4), (2**31, 2**31), (2**600, 2**600)])
def test_bitmask_of_another_shape_is_refused(shape):
    assert refusal(BITMASK, bitmask(), shape) == f"has no bit for each of {shape}"


def test_bitmask_of_a_shape_that_its_bits_reach_out_of_is_refused():
    assert refusal(BITMASK, bitmask(), (3, 3)) == "has bits beyond its last element"


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (), (1, 4)])
def test_dense_of_another_shape_is_refused(shape):
    assert refusal(DENSE, DENSE.encode(FACTOR), shape) == f"has values of shape (3, 4) for places of {shape}"


@settings(max_examples=300, deadline=None)
@given(
    starts=st.lists(st.sampled_from([0, 1, 2, 3, 4, -1, -2, HUGE, HUGE - 1, -HUGE - 1]), min_size=3, max_size=3),
    columns=st.lists(st.integers(0, 5), min_size=4, max_size=4),
)
def test_csr_arrays_that_decode_are_those_that_encoding_gives_again(starts, columns):
    parts = {"values": torch.arange(1.0, 5.0), "columns": short(*columns), "row_starts": torch.tensor([*starts, 4])}
    try:
        factor = CSR.decode(parts, (3, 5))
    except InputError:
        return
    again = CSR.encode(factor)
    assert all(torch.equal(again[name], parts[name]) for name in parts)
