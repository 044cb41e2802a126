"""Safetensors files that are none: refused with one line that names the file, and the tensor where there is one."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tcompress.checkpoint.safetensors_file import MAX_HEADER_BYTES, MAX_JSON_VALUES, SafetensorsFile
from tcompress.errors import InputError, SafetyError, TcompressError, UnsupportedError

LENGTH = "is truncated or not a safetensors file; download it again"
SHAPE = "tensor t: its shape is not a short list of sizes"
ENTRY = "tensor t: its header entry lacks dtype, shape or data_offsets"
METADATA = "its metadata must map strings to strings"
DIGITS = "9" * 4300


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def refusal(path, kind=InputError):
    with pytest.raises(TcompressError) as caught:
        SafetensorsFile(path)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


VALID = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int16)}, {"format": "pt"})


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 60, len(VALID) - 33])
def test_a_file_that_ends_in_its_header_is_refused(path, kept):
    path.write_bytes(VALID[:kept])
    assert refusal(path) == LENGTH


@pytest.mark.parametrize("missing", [1, 8, 31, 32])
def test_a_file_that_ends_in_its_data_is_refused(path, missing):
    path.write_bytes(VALID[:-missing])
    assert refusal(path) == f"is truncated or damaged: 32 bytes of data declared, {32 - missing} there"


def test_bytes_behind_the_last_tensor_are_refused(path):
    path.write_bytes(VALID + b"x")
    assert refusal(path) == "is truncated or damaged: 32 bytes of data declared, 33 there"


@pytest.mark.parametrize("content", [b"hello world, I am a text", b"\xff" * 100, b"PK\3\4" + bytes(60)])
def test_something_else_is_refused(path, content):
    path.write_bytes(content)
    assert refusal(path) == LENGTH


def test_a_header_longer_than_safetensors_allows_is_refused_before_it_is_read(path):
    path.write_bytes((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, MAX_HEADER_BYTES + 100)
    assert refusal(path) == "claims a header of 100000001 bytes, more than safetensors allows"


def test_a_header_of_more_values_than_any_model_has_is_refused_before_it_is_parsed(path):
    write(path, b'{"a":[' + b"[]," * MAX_JSON_VALUES + b"[]]}")
    assert refusal(path, SafetyError) == "its JSON has more than 3000000 values"


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"", "its JSON cannot be read (Expecting value: line 1 column 1 (char 0))"),
        (b"{", "its JSON cannot be read (Expecting property name enclosed in double quotes"),
        (b"\xff\xfe{}", "its JSON cannot be read ('utf-8' codec can't decode"),
        ("{}".encode("utf-16-le"), "its JSON cannot be read (Expecting property name"),
        (b'{"\xed\xa0\x80": 1}', "its JSON cannot be read ('utf-8' codec can't decode"),
        (b'{"\\ud800": 1}', "its JSON cannot be read ('utf-8' codec can't encode"),
        (b"\xef\xbb\xbf{}", "its JSON cannot be read (Unexpected UTF-8 BOM"),
        (b"[]", "its JSON is not an object"),
        (b"7", "its JSON is not an object"),
        (b'"{}"', "its JSON is not an object"),
        (b"  {}", "its JSON is not an object"),
        (b"\n{}", "its JSON is not an object"),
        (b"{} {}", "its JSON cannot be read (Extra data"),
        (b'{"a": NaN}', "its JSON cannot be read (a number in it is not finite)"),
        (b'{"a": -Infinity}', "its JSON cannot be read (a number in it is not finite)"),
        (b'{"a": 1e999}', "its JSON cannot be read (a number in it is not finite)"),
        (b'{"a": {"b": 1, "b": 1}}', "its JSON cannot be read (a name stands there twice)"),
        (b'{"a": 1, "\\u0061": 1}', "its JSON cannot be read (a name stands there twice)"),
        (b'{"a": ' * 100_000, "its JSON cannot be read (maximum recursion depth exceeded"),
        (b'{"a": ' + b"[" * 100_000, "its JSON cannot be read (maximum recursion depth exceeded"),
        (b'{"a": 9' + DIGITS.encode() + b"}", "its JSON cannot be read (Exceeds the limit (4300 digits)"),
    ],
)
def test_a_header_that_is_no_json_object_is_refused(path, header, problem):
    assert refusal(write(path, header)).startswith(problem)


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ((4, 12), "tensor u: lies at bytes 4 to 12, but 8 bytes from 8 were expected"),
        ((0, 8), "tensor u: lies at bytes 0 to 8, but 8 bytes from 8 were expected"),
        ((9, 17), "tensor u: lies at bytes 9 to 17, but 8 bytes from 8 were expected"),
        ((8, 12), "tensor u: lies at bytes 8 to 12, but 8 bytes from 8 were expected"),
        ((8, 24), "tensor u: lies at bytes 8 to 24, but 8 bytes from 8 were expected"),
        ((8, 0), "tensor u: lies at bytes 8 to 0, but 8 bytes from 8 were expected"),
        ((-8, 0), "tensor u: lies at bytes -8 to 0, but 8 bytes from 0 were expected"),
        ((8, 2**64), f"tensor u: lies at bytes 8 to {2**64}, but 8 bytes from 8 were expected"),
        ((int(DIGITS), 8), f"tensor u: lies at bytes {DIGITS} to 8, but 8 bytes from 8 were expected"),
    ],
)
def test_overlaps_holes_and_wrong_sizes_are_refused(path, second, problem):
    assert refusal(write(path, {"t": entry(), "u": entry(offsets=second)}, bytes(16))) == problem


@pytest.mark.parametrize(
    ("damaged", "problem"),
    [
        (entry(shape=(3,)), "tensor t: lies at bytes 0 to 8, but 12 bytes from 0 were expected"),
        (entry(shape=()), "tensor t: lies at bytes 0 to 8, but 4 bytes from 0 were expected"),
        (entry(shape=(2**32, 2**31)), "tensor t: its shape is larger than any memory"),
        (entry(shape=(0, 2**62, 2**62), offsets=(0, 0)), "tensor t: its shape is larger than any memory"),
        (entry(shape=(0, int(DIGITS)), offsets=(0, 0)), "tensor t: its shape is larger than any memory"),
        (entry(shape=(2**64 + 2,)), "tensor t: its shape is larger than any memory"),
        (entry(shape=(-1, -2)), SHAPE),
        (entry(shape=(True, 2)), SHAPE),
        (entry(shape=(2.0,)), SHAPE),
        (entry(shape=("2",)), SHAPE),
        (entry(shape=(None,)), SHAPE),
        (entry(shape=(1,) * 64 + (2,)), SHAPE),
        ({**entry(), "shape": 2}, ENTRY),
        ({**entry(), "shape": "2"}, ENTRY),
        ({**entry(), "shape": {"0": 2}}, ENTRY),
        (entry(offsets=(0, 4, 8)), ENTRY),
        (entry(offsets=(0.0, 8.0)), ENTRY),
        (entry(offsets=("0", "8")), ENTRY),
        (entry(dtype=32), ENTRY),
        (entry(dtype=None), ENTRY),
        ({"dtype": "F32", "shape": [2]}, ENTRY),
        ([], ENTRY),
        (None, ENTRY),
        ("F32", ENTRY),
    ],
)
def test_a_damaged_entry_is_refused_by_the_tensors_name(path, damaged, problem):
    assert refusal(write(path, {"t": damaged}, bytes(8))) == problem


def test_64_dimensions_are_read(path):
    assert SafetensorsFile(write(path, {"t": entry(shape=(1,) * 63 + (2,))}, bytes(8)))["t"].values == 2


def test_an_unknown_type_is_named(path):
    write(path, {"t": entry(dtype="F128\n")}, bytes(8))
    assert refusal(path, UnsupportedError) == "tensor t: its values are of the unknown type F128\\n"


def test_a_name_with_control_characters_is_escaped(path):
    assert refusal(write(path, {"a\n\x1b[2J": None})).startswith("tensor a\\n\\x1b[2J: its header entry lacks")


@pytest.mark.parametrize("metadata", [[], None, "pt", {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"a": ["b"]}])
def test_metadata_that_is_no_text_is_refused(path, metadata):
    assert refusal(write(path, {"__metadata__": metadata})) == METADATA


def test_what_only_the_safetensors_library_refuses_is_refused_too(path):
    write(path, {"t": entry(shape=(1,), offsets=(False, 4))}, bytes(4))
    assert refusal(path).startswith("is not a valid safetensors file (")


def test_a_fifo_is_refused_without_waiting_for_a_writer(path):
    os.mkfifo(path)
    assert refusal(path) == "is not a regular file"


def test_a_folder_a_missing_file_and_a_broken_link_are_refused(path, tmp_path):
    path.mkdir()
    assert refusal(path) == "is not a regular file"
    assert refusal(tmp_path / "other") == "cannot be read (No such file or directory)"
    (tmp_path / "link").symlink_to("nowhere")
    assert refusal(tmp_path / "link") == "cannot be read (No such file or directory)"


@pytest.mark.parametrize("values", [8, 600_000])
def test_a_file_that_changed_after_it_was_opened_is_an_input_error(path, values):
    path.write_bytes(save({"a": torch.zeros(values)}))
    checkpoint = SafetensorsFile(path)
    os.truncate(path, len(checkpoint.header) + 16)
    for read in (checkpoint.read, checkpoint.raw):
        with pytest.raises(InputError) as caught:
            read("a")
        assert str(caught.value) == f"{path}: was changed while it was read: it is shorter now"
    path.unlink()
    with pytest.raises(InputError) as caught:
        checkpoint.read("a")
    reason = "its data can no longer be read (No such file or directory); was the file changed?"
    assert str(caught.value) == f"{path}: {reason}"


def read_or_refuse(path, content):
    path.write_bytes(content)
    message = ""
    try:
        with SafetensorsFile(path) as checkpoint:
            for name in checkpoint:
                assert checkpoint.read(name).nbytes == checkpoint[name].nbytes == len(checkpoint.raw(name))
    except TcompressError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
edits = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.binary(max_size=6), st.integers(0, 6)), max_size=6)


@fuzz
@given(edits)
def test_any_change_of_a_file_is_read_or_refused(path, changes):
    content = bytearray(VALID)
    for start, inserted, removed in changes:
        content[start : start + removed] = inserted
    read_or_refuse(path, bytes(content))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
sizes = st.lists(st.integers(0, 4) | st.sampled_from([2**31, 2**62, 2**64, -1]) | json_values, max_size=4)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F64", "F32", "BF16", "U8", "BOOL", "F4", "F8_E4M3", "X"]),
        "shape": sizes,
        "data_offsets": st.lists(st.integers(0, 16) | json_values, min_size=2, max_size=2),
    }
)


@fuzz
@given(st.dictionaries(st.text(max_size=3), entries | json_values, max_size=3), st.binary(max_size=16))
@example({"t": entry(shape=(0, 2**62), offsets=(0, 0))}, b"")
@example({"t": entry("F64", shape=(2**61, 0, 4), offsets=(0, 0))}, b"")
def test_any_header_is_read_or_refused(path, header, data):
    text = json.dumps(header).encode()
    read_or_refuse(path, len(text).to_bytes(8, "little") + text + data)
