"""A safetensors file as other programs write it: every type, every shape, every name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.safetensors_file import SafetensorsFile
from tcompress.errors import UnsupportedError

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def write(path, entries, data=b"", *, padding=b""):
    """Write a file by hand: header entries, data, and bytes between them."""
    header = json.dumps(entries).encode() + padding
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def bytes_of(tensor):
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (0,), (4, 0, 2), (2, 1, 3, 1, 2)], ids=str)
def test_every_type_and_shape_is_read_bit_by_bit(path, dtype, shape):
    count = torch.empty(shape).numel()
    numbers = (torch.arange(count * dtype.itemsize) * 37 % 256).to(torch.uint8)
    raw = numbers % 2 if dtype == torch.bool else numbers
    tensor = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    save_file({"t": tensor}, path)
    with SafetensorsFile(path) as checkpoint:
        found = checkpoint.read("t")
        assert (checkpoint["t"].shape, checkpoint["t"].dtype.torch) == (shape, dtype)
        assert checkpoint["t"].nbytes == tensor.nbytes
        assert (tuple(found.shape), found.dtype) == (shape, dtype)
        assert bytes_of(found) == bytes_of(tensor) == bytes(checkpoint.raw("t"))


def test_the_tensors_come_in_the_order_of_their_data_with_the_metadata(path):
    tensors = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.int64), "c": torch.empty(0)}
    save_file(tensors, path, metadata={"format": "pt", "note": "ä\n"})
    checkpoint = SafetensorsFile(path)
    assert set(checkpoint) == {"a", "b", "c"}
    assert len(checkpoint) == 3
    assert checkpoint.metadata == {"format": "pt", "note": "ä\n"}
    assert checkpoint.files == (path,)
    assert (checkpoint.folder, checkpoint.sharded, checkpoint.key) == (None, False, None)
    assert (checkpoint.tied, checkpoint.other_values, checkpoint.shards) == ({}, (), (checkpoint,))
    assert next(iter(checkpoint)) == "a"  # the file has wide types first


def test_a_file_without_tensors_is_an_empty_checkpoint(path):
    assert list(SafetensorsFile(write(path, {}))) == []
    assert list(SafetensorsFile(write(path, {"__metadata__": {"format": "pt"}}))) == []


@pytest.mark.parametrize(
    "name", ["", "ä.weight", "重み", "a\nb", "\x1b[31mred", "nul\0", "🙂" * 50, "../../x", "a/b", '"']
)
def test_any_text_is_a_name(path, name):
    save_file({name: torch.arange(3.0)}, path)
    assert SafetensorsFile(path).read(name).tolist() == [0, 1, 2]


@pytest.mark.parametrize("spaces", range(9))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_data_between_two_machine_words_is_read(path, spaces, dtype):
    tensor = torch.arange(4).to(dtype)
    code = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}[dtype]
    entries = {
        "first": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "second": {"dtype": code, "shape": [2, 2], "data_offsets": [1, 1 + tensor.nbytes]},
    }
    checkpoint = SafetensorsFile(write(path, entries, b"\7" + bytes_of(tensor), padding=b" " * spaces))
    found = checkpoint.read("second")
    assert torch.equal(found, tensor.reshape(2, 2))
    assert found.data_ptr() % found.element_size() == 0
    assert checkpoint.read("first").tolist() == [7]


@pytest.mark.parametrize("values", [31, 300_007])
def test_each_tensor_is_read_from_its_own_place(path, values):
    tensors = {f"t{i}": torch.full((values,), float(i)) for i in range(3)}
    save_file(tensors, path)
    checkpoint = SafetensorsFile(path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)


@pytest.mark.parametrize("values", [3, 300_000])
def test_changing_a_tensor_in_place_never_reaches_the_file(path, values):
    save_file({"t": torch.zeros(values)}, path)
    before = path.read_bytes()
    SafetensorsFile(path).read("t").fill_(1)
    assert path.read_bytes() == before
    assert not SafetensorsFile(path).read("t").any()


@pytest.mark.parametrize(("code", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_types_below_a_byte_are_described_and_copied_but_not_read(path, code, bits):
    nbytes = 8 * bits // 8
    write(path, {"t": {"dtype": code, "shape": [8], "data_offsets": [0, nbytes]}}, bytes(range(nbytes)))
    checkpoint = SafetensorsFile(path)
    assert checkpoint["t"].nbytes == nbytes
    assert bytes(checkpoint.raw("t")) == bytes(range(nbytes))
    with pytest.raises(UnsupportedError) as caught:
        checkpoint.read("t")
    assert str(caught.value) == f"{path}: tensor t: PyTorch has no type for {code} values"


def test_the_header_is_kept_byte_by_byte(path):
    write(path, {"t": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"ab", padding=b"   ")
    assert SafetensorsFile(path).header == path.read_bytes()[:-2]
