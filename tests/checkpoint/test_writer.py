"""Safetensors files piece by piece: others can read them, their size was known, the same input gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tcompress.checkpoint.dtypes import BY_CODE, BY_NAME, BY_TORCH
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.manifest import Entry, Factor, Manifest, figure
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.safetensors_file import SafetensorsFile
from tcompress.checkpoint.writer import Piece, file_bytes, in_shards, write_file
from tcompress.errors import OutputError

TENSORS = {
    "fc.weight.left": torch.randn(5, 2, generator=torch.Generator().manual_seed(1)),
    "fc.bias": torch.arange(3, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
    "ä\n🙂": torch.tensor([1, 2, 65535]).to(torch.uint16),
    "wide": torch.tensor([[1.5, -0.0]], dtype=torch.float64),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def pieces_of(tensors):
    return [
        Piece(name, BY_TORCH[tensor.dtype], tuple(tensor.shape), name, lambda tensor=tensor: bytes_of(tensor))
        for name, tensor in tensors.items()
    ]


def manifest_with(norm=2.5, relative_error=0.125, layers=1):
    entry = Entry(
        format="svd",
        options={"rank": 2},
        kind=LayerKind.LINEAR,
        shape=(5, 4),
        dtype=BY_NAME["float32"],
        norm=norm,
        relative_error=relative_error,
        factors={"left": Factor("dense"), "right": Factor("dense")},
    )
    return Manifest(writer="tcompress 0", layers={f"fc{number}": entry for number in range(layers)})


def header_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("manifest", [None, manifest_with()], ids=["plain", "compressed"])
@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "b": "ä", "a": '"\n'}], ids=["bare", "metadata"])
def test_the_safetensors_library_reads_what_was_written(path, metadata, manifest):
    write_file(path, pieces_of(TENSORS), metadata, manifest)
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert (loaded[name].shape, loaded[name].dtype) == (tensor.shape, tensor.dtype)
        assert bytes_of(loaded[name]) == bytes_of(tensor)
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    assert {key: value for key, value in found.items() if key != "tcompress"} == metadata
    assert ("tcompress" in found) == (manifest is not None)


@pytest.mark.parametrize("manifest", [None, manifest_with()], ids=["plain", "compressed"])
@pytest.mark.parametrize("count", range(len(TENSORS) + 1))
def test_the_size_is_known_before_there_is_data(path, manifest, count):
    pieces = pieces_of(dict(list(TENSORS.items())[:count]))
    planned = file_bytes([replace(piece, data=None) for piece in pieces], {"format": "pt"}, manifest)
    write_file(path, pieces, {"format": "pt"}, manifest)
    assert path.stat().st_size == planned


@pytest.mark.parametrize("norm", [0.0, 1.0, 1.234567e-99, 9.87654321e14, 1.23456789e15, 9.9999999e15, 1.5e16, 1e300])
@pytest.mark.parametrize("layers", [1, 40])
def test_the_size_does_not_depend_on_the_figures(path, norm, layers):
    pieces, manifest = pieces_of(TENSORS), manifest_with(figure(norm), figure(norm), layers)
    write_file(path, pieces, {}, manifest)
    assert path.stat().st_size == file_bytes(pieces, {}, manifest_with(layers=layers))
    assert set(load_file(path)) == set(TENSORS)


def test_every_tensor_is_aligned_to_its_element(path):
    write_file(path, pieces_of(TENSORS), {"format": "pt"}, manifest_with())
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert start % 8 == 0
    for name, entry in header_of(path).items():
        if name != "__metadata__":
            assert (start + entry["data_offsets"][0]) % BY_CODE[entry["dtype"]].itemsize == 0


def test_the_same_input_gives_the_same_bytes(path, tmp_path):
    again = tmp_path / "again.safetensors"
    write_file(path, pieces_of(TENSORS), {"b": "1", "a": "2"}, manifest_with())
    write_file(again, pieces_of(TENSORS), {"a": "2", "b": "1"}, manifest_with())
    assert path.read_bytes() == again.read_bytes()


def test_tensors_of_equal_width_keep_their_order(path):
    write_file(path, pieces_of({name: torch.ones(1) for name in "zab"}), {}, None)
    assert list(header_of(path)) == ["z", "a", "b"]


def test_types_below_a_byte_are_copied(path):
    piece = Piece("t", BY_CODE["F4"], (3, 2), "t", lambda: memoryview(b"abc"))
    write_file(path, [piece], {}, None)
    assert bytes(SafetensorsFile(path).raw("t")) == b"abc"


def test_data_of_another_size_than_announced_is_refused(path):
    piece = Piece("t", BY_CODE["F32"], (2,), "t", lambda: memoryview(b"1234567"))
    with pytest.raises(OutputError) as caught:
        write_file(path, [piece], {}, None)
    assert str(caught.value) == "tensor t: has 7 bytes where 8 were announced"


@pytest.mark.parametrize("names", [["a", "b", "a"], ["a", "__metadata__"]])
def test_names_that_a_file_cannot_hold_are_refused_before_anything_is_written(path, names):
    pieces = [replace(piece, name=name) for piece, name in zip(pieces_of(TENSORS), names, strict=False)]
    with pytest.raises(OutputError) as caught:
        write_file(path, pieces, {}, None)
    assert str(caught.value) == f"tensor {names[-1]}: is a name that the file has already"
    assert not path.exists()


def test_a_header_that_safetensors_would_refuse_is_not_written(path):
    with pytest.raises(OutputError) as caught:
        write_file(path, [], {"note": "x" * 100_000_000}, None)
    assert str(caught.value).endswith("more than safetensors allows")
    assert not path.exists()


def sized(name, nbytes, group=None):
    return Piece(name, BY_CODE["U8"], (nbytes,), group or name)


def names_of(shards):
    return [[piece.name for piece in shard] for shard in shards]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([4, 4, 4], 12, [[0, 1, 2]]),
        ([4, 4, 4], 11, [[0, 1], [2]]),
        ([4, 4, 4], 1, [[0], [1], [2]]),
        ([2, 20, 2], 8, [[0], [1], [2]]),
        ([20, 0, 8], 8, [[0], [1, 2]]),
        ([0, 0], 8, [[0, 1]]),
    ],
)
def test_shards_are_filled_in_order_and_only_a_larger_piece_exceeds_them(sizes, limit, expected):
    pieces = [sized(str(number), size) for number, size in enumerate(sizes)]
    assert names_of(in_shards(pieces, limit)) == [[str(number) for number in shard] for shard in expected]


def test_a_group_is_never_divided():
    pieces = [sized("a", 6), sized("b.left", 2, "b"), sized("c", 1), sized("b.right", 2, "b")]
    assert names_of(in_shards(pieces, 8)) == [["a"], ["b.left", "b.right", "c"]]
    assert names_of(in_shards(pieces, 3)) == [["a"], ["b.left", "b.right"], ["c"]]
