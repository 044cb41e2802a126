"""Parts of elias-fano, delta8, n:m and codes that a stranger wrote: what contradicts itself or the shape is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.errors import InputError
from tests.encodings.factors import coding_of

FACTOR = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 4.0, 0.0]])


def octets(*numbers, dtype=torch.uint8):
    return torch.tensor(numbers, dtype=dtype)


def refusal(coding, shape=(3, 4), **changed):
    with pytest.raises(InputError) as caught:
        coding.decode({**coding.encode(FACTOR), **changed}, shape)
    return str(caught.value)


def with_entry(tensor, position, value):
    changed = tensor.clone()
    changed.view(-1)[position] = value
    return changed


LIST = "has gaps that are no plain list of bytes"
BEYOND = "has gaps that reach beyond its last element"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"gaps": octets(1, 1, 4, 255)}, "has a gap after its last value"),
        ({"gaps": octets(1, 1, 4, 1, 255)}, "has a gap after its last value"),
        ({"gaps": octets(1, 1, 4, 3)}, BEYOND),
        ({"gaps": octets(1, 1, 255, 0)}, BEYOND),
        ({"gaps": octets(254, 254, 254, 254)}, BEYOND),
        ({"gaps": octets(1, 1, 4)}, "has values of shape (4,) for places of (3,)"),
        ({"gaps": octets(1, 1, 4, 0, 0)}, "has values of shape (4,) for places of (5,)"),
        ({"values": torch.ones(5)}, "has values of shape (5,) for places of (4,)"),
        ({"gaps": octets(1, 1, 4, 1)[None]}, LIST),
        ({"gaps": octets(1, 1, 4, 1, dtype=torch.int8)}, LIST),
        ({"gaps": octets(1, 1, 4, 1, dtype=torch.int64)}, LIST),
        ({"gaps": octets(1, 1, 4, 1, dtype=torch.float32)}, LIST),
    ],
)
def test_delta8_parts_that_contradict_each_other_are_refused(changed, problem):
    assert refusal(coding_of("delta8"), **changed) == problem


@pytest.mark.parametrize("shape", [(2, 4), (), (0, 4)])
def test_delta8_of_a_smaller_shape_is_refused(shape):
    assert refusal(coding_of("delta8"), shape) == BEYOND


THIN = torch.zeros(8, 16).index_put_((torch.arange(8), torch.arange(8) + 3), torch.ones(()))  # 3, 20, ..., 122
POSITIONS = coding_of("elias-fano:3").encode(THIN)["positions"]  # three rows of a byte, and 23 bits in three


@pytest.mark.parametrize(
    ("positions", "problem"),
    [
        (POSITIONS[:-1], "has not the bits of"),
        (torch.cat([POSITIONS, octets(0)]), "has not the bits of"),
        (octets(*POSITIONS[:3].tolist(), 255, 255, 0), "has not the bits of 16 positions in (8, 16)"),
        (octets(*[0] * 6), "has not the bits of 0 positions in (8, 16)"),
        (octets(*POSITIONS[:3].tolist(), 255, 0, 0), "has positions that fall, or beyond its last"),
        (octets(0, 0, 0, 255, 0, 0), "has positions that fall, or beyond its last"),
        (torch.cat([POSITIONS[:3] & 127, POSITIONS[3:5], octets(137)]), "has positions that fall, or beyond its last"),
        (POSITIONS[None], "has positions that are no plain list of bytes"),
        (POSITIONS.int(), "has positions that are no plain list of bytes"),
        (POSITIONS.view(torch.int8), "has positions that are no plain list of bytes"),
    ],
)
def test_positions_that_contradict_each_other_or_the_shape_are_refused(positions, problem):
    coding = coding_of("elias-fano:3")
    with pytest.raises(InputError) as caught:
        coding.decode({**coding.encode(THIN), "positions": positions}, (8, 16))
    assert str(caught.value).startswith(problem)


def test_other_numbers_of_values_than_of_positions_are_refused():
    assert refusal(coding_of("elias-fano:1"), values=torch.ones(5)) == "has values of shape (5,) for places of (4,)"


EMPTIED = {
    "bitmask": ("mask", {"mask": octets(*[0] * 16)}),
    "elias-fano:3": ("positions", {"positions": octets()}),
    "delta8": ("gaps", {"gaps": octets()}),
    "csr": ("columns and row_starts", {"columns": octets().to(torch.uint16), "row_starts": torch.zeros(9).long()}),
}


@pytest.mark.parametrize("held", [None, "int8", "int4", "int3"])
@pytest.mark.parametrize("name", EMPTIED)
def test_places_that_are_lost_are_told_apart_from_values_that_are_too_many(name, held):
    coding, (where, emptied) = coding_of(name, held), EMPTIED[name]
    with pytest.raises(InputError) as caught:
        coding.decode({**coding.encode(THIN), **emptied}, (8, 16))
    what = "values" if held is None else "codes"
    assert str(caught.value) == f"has {what}, but no places for them: its {where} tell of none"


@pytest.mark.parametrize("low", [0, 3, 48])
def test_no_positions_take_no_bytes(low):
    parts = coding_of(f"elias-fano:{low}").encode(torch.zeros(8, 16))
    assert parts["positions"].numel() == 0


def test_low_bits_of_no_position_are_refused():
    parts = coding_of("elias-fano:3").encode(THIN[:6])  # six positions, a row of eight bits for each of their low ones
    parts["positions"][0] |= 64
    with pytest.raises(InputError, match="has bits beyond its last position"):
        coding_of("elias-fano:3").decode(parts, (6, 16))


@settings(max_examples=300, deadline=None)
@given(
    low=st.integers(0, 3),
    positions=st.lists(st.sampled_from([0, 1, 3, 17, 128, 255]), max_size=6),
    elements=st.integers(0, 60),
)
def test_positions_that_decode_are_those_that_encoding_gives_again(low, positions, elements):
    coding = coding_of(f"elias-fano:{low}")
    for count in range(20):
        parts = {"values": torch.ones(count), "positions": torch.tensor(positions, dtype=torch.uint8)}
        try:
            factor = coding.decode(parts, (elements,))
        except InputError:
            continue
        assert int(factor.count_nonzero()) == count
        assert torch.equal(coding.unpack(parts, (elements,)), factor)
        assert coding.encode(factor)["positions"].tolist() == positions


@settings(max_examples=200, deadline=None)
@given(elements=st.integers(1, 400), part=st.floats(0, 1), low=st.integers(0, 9), seed=st.integers(0, 99))
def test_where_the_low_bits_end_is_told_by_the_length(elements, part, low, seed):
    chosen = torch.rand(elements, generator=torch.Generator().manual_seed(seed)) < part
    coding = coding_of(f"elias-fano:{low}")
    parts = coding.encode(chosen.float())
    assert torch.equal(coding.decode(parts, (elements,)), chosen.float())
    assert torch.equal(coding.unpack(parts, (elements,)), chosen.float())


@settings(max_examples=300, deadline=None)
@given(gaps=st.lists(st.sampled_from([0, 1, 2, 100, 254, 255]), max_size=6))
def test_gaps_that_decode_are_those_that_encoding_gives_again(gaps):
    coding = coding_of("delta8")
    values = torch.ones(sum(gap < 255 for gap in gaps))
    try:
        factor = coding.decode({"values": values, "gaps": torch.tensor(gaps, dtype=torch.uint8)}, (4, 150))
    except InputError:
        return
    assert coding.encode(factor)["gaps"].tolist() == gaps


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        # Three groups of three bits; numbers from 0 to 5.
        ({"patterns": octets(6, 0)}, "has a pattern that is none of 2:4"),
        ({"patterns": octets(0b11_000_000, 1)}, "has a pattern that is none of 2:4"),
        ({"patterns": octets(0, 2)}, "has bits beyond its last pattern"),
        ({"patterns": octets(0, 128)}, "has bits beyond its last pattern"),
        ({"patterns": octets(0)}, "has not the patterns of (3, 4)"),
        ({"patterns": octets(0, 0, 0)}, "has not the patterns of (3, 4)"),
        ({"patterns": octets(0, 0)[None]}, "has not the patterns of (3, 4)"),
        ({"patterns": octets(0, 0, dtype=torch.int8)}, "has not the patterns of (3, 4)"),
        ({"values": torch.ones(4)}, "has values of shape (4,) for places of (6,)"),
    ],
)
def test_patterns_that_contradict_the_shape_are_refused(changed, problem):
    assert refusal(coding_of("2:4"), **changed) == problem


@pytest.mark.parametrize("shape", [(4, 3), (), (3, 6), (2, 2, 3)])
def test_rows_that_are_not_made_of_groups_are_refused(shape):
    assert refusal(coding_of("2:4"), shape) == f"is 2:4, but rows of its shape {shape} are not made of 4"


CODES8, SCALE8 = coding_of("dense", "int8").encode(FACTOR).values()
FINITE = "has scales that are negative or not finite"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"codes": with_entry(CODES8, 3, -128)}, "has codes below -127"),
        ({"codes": CODES8.to(torch.int16)}, "has codes that are not torch.int8"),
        ({"codes": CODES8.view(torch.uint8)}, "has codes that are not torch.int8"),
        ({"codes": CODES8.float()}, "has codes that are not torch.int8"),
        ({"codes": CODES8[:2]}, "has codes of shape (2, 4) for places of (3, 4)"),
        ({"codes": CODES8.reshape(-1)}, "has codes of shape (12,) for places of (3, 4)"),
        ({"scale": SCALE8[:2]}, "has not 3 scales in torch.float32"),
        ({"scale": SCALE8[:, None]}, "has not 3 scales in torch.float32"),
        ({"scale": SCALE8.double()}, "has not 3 scales in torch.float32"),
        ({"scale": SCALE8.half()}, "has not 3 scales in torch.float32"),
        ({"scale": with_entry(SCALE8, 1, -1e-3)}, FINITE),
        ({"scale": with_entry(SCALE8, 1, float("nan"))}, FINITE),
        ({"scale": with_entry(SCALE8, 1, float("inf"))}, FINITE),
    ],
)
def test_int8_parts_that_contradict_each_other_are_refused(changed, problem):
    assert refusal(coding_of("dense", "int8"), **changed) == problem


@pytest.mark.parametrize("shape", [(), (12,)])
@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
def test_codes_of_a_vector_are_refused(values, shape):
    assert refusal(coding_of("dense", values), shape) == f"has codes, but its shape {shape} has no rows"


COUNT4 = "has not the codes of 4 values, two to a byte"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"codes": octets(0)}, COUNT4),
        ({"codes": octets(0, 0, 0)}, COUNT4),
        ({"codes": octets(0, 0)[None]}, COUNT4),
        ({"codes": octets(0, 0, dtype=torch.int8)}, COUNT4),
        ({"scale": torch.ones(2).half()}, "has not 1 scales in torch.float16"),
        ({"scale": torch.ones(1)}, "has not 1 scales in torch.float16"),
        ({"scale": torch.ones(1).bfloat16()}, "has not 1 scales in torch.float16"),
        ({"scale": torch.full((1,), float("nan")).half()}, "has scales that are not finite"),
        ({"scale": torch.full((1,), -float("inf")).half()}, "has scales that are not finite"),
        ({"mask": octets(0b1010, 0b0001)}, "has a code beyond its last value"),
        ({"mask": octets(0b1111, 0b0111)}, "has not the codes of 7 values, two to a byte"),
    ],
)
def test_int4_parts_that_contradict_each_other_are_refused(changed, problem):
    parts = {"codes": octets(0x21, 0x43), "scale": torch.ones(1).half()}
    assert refusal(coding_of("bitmask", "int4"), **{**parts, **changed}) == problem


COUNT3 = "has not the codes of 4 values, in three rows of bits"
SCALES3 = "has not an offset and 1 scales in torch.float16"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"codes": octets(0, 0, 0)}, COUNT3),
        ({"codes": octets(0, 0)[:, None]}, COUNT3),
        ({"codes": octets(0, 0, 0)[:, None].int()}, COUNT3),
        ({"codes": torch.zeros(3, 2).byte()}, COUNT3),
        ({"codes": octets(0, 16, 0)[:, None]}, "has codes beyond its last value"),
        ({"scale": torch.ones(1).half()}, SCALES3),
        ({"scale": torch.ones(3).half()}, SCALES3),
        ({"scale": torch.ones(2)}, SCALES3),
        ({"scale": torch.ones(2).half()[None]}, SCALES3),
        ({"scale": torch.tensor([1, float("nan")]).half()}, "has an offset or scales that are not finite"),
        ({"scale": torch.tensor([float("inf"), 1]).half()}, "has an offset or scales that are not finite"),
        ({"scale": torch.tensor([-0.5, 1]).half()}, "has an offset that is negative"),
        ({"mask": octets(0b11111111, 1)}, "has not the codes of 9 values, in three rows of bits"),
    ],
)
def test_int3_parts_that_contradict_each_other_are_refused(changed, problem):
    parts = {"codes": octets(1, 2, 3)[:, None], "scale": torch.ones(2).half()}
    assert refusal(coding_of("bitmask", "int3"), **{**parts, **changed}) == problem


def test_every_int3_code_is_right_and_any_offset_is_read():
    codes = octets(0b11110000, 0b10101010, 0b11001100)[:, None]
    parts = {"codes": codes, "scale": torch.tensor([0.3, 0.5]).half()}
    found = coding_of("dense", "int3").decode(parts, (2, 4)).reshape(-1)
    positive = (torch.arange(4) + torch.tensor(0.3).half().float()) * 0.5
    assert torch.equal(found, torch.cat([positive, -positive]))


def test_every_int4_code_and_either_sign_of_scale_is_right():
    codes = torch.tensor([low | high << 4 for low, high in zip(range(0, 16, 2), range(1, 16, 2), strict=True)])
    for scale in (0.5, -0.25, 0.0):
        parts = {"codes": codes.to(torch.uint8), "scale": torch.tensor([scale]).half()}
        found = coding_of("dense", "int4").decode(parts, (2, 8)).reshape(-1)
        assert found.tolist() == [scale * code for code in [*range(8), *range(-8, 0)]]
