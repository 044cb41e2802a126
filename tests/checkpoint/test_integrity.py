"""Bit rot is found: whichever byte of a compressed file changes, reading or checking tells."""

from __future__ import annotations

import random
import re

import pytest
import torch

from tcompress.checkpoint import shards
from tcompress.checkpoint.dtypes import BY_NAME, BY_TORCH
from tcompress.checkpoint.integrity import damage
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.manifest import Entry, Factor, Manifest
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.safetensors_file import SafetensorsFile
from tcompress.checkpoint.shards import Contents, Layout
from tcompress.checkpoint.writer import Piece
from tcompress.errors import TcompressError

TENSORS = {
    "fc.weight.left": torch.linspace(-1, 1, 12).reshape(6, 2),
    "fc.weight.right": torch.linspace(0, 3, 8).reshape(2, 4),
    "fc.bias": torch.arange(6, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.empty(0, 3),
}
GROUPS = {"fc.weight.left": "fc.weight", "fc.weight.right": "fc.weight"}


@pytest.fixture
def path(tmp_path):
    """A compressed file of one layer, smaller than 3 kB."""
    pieces = [
        Piece(name, BY_TORCH[tensor.dtype], tuple(tensor.shape), GROUPS.get(name, name), lambda t=tensor: bytes_of(t))
        for name, tensor in TENSORS.items()
    ]
    factors = {"left": Factor("dense"), "right": Factor("dense")}
    entry = Entry("svd", {"rank": 2}, LayerKind.LINEAR, (6, 4), BY_NAME["float32"], 2.5, 0.125, factors)
    manifest = Manifest(
        writer="tcompress 0",
        source={"sha256": "ab" * 32, "bytes": 500},
        rebuild={"svd": "(left @ right).reshape(shape)"},
        layers={"fc.weight": entry},
    )
    path = tmp_path / "small.safetensors"
    shards.write(path, Contents(pieces, {"format": "pt"}, manifest), Layout(None))
    return path


def problems(path):
    with SafetensorsFile(path) as file:
        return [problem.removeprefix(f"{path}: ") for problem in damage(file)]


def is_found(path):
    try:
        return bool(problems(path))
    except TcompressError:
        return True


def changed(path, old, new):
    content = path.read_bytes()
    assert len(old) == len(new)
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))
    return path


def test_an_unchanged_file_is_without_damage(path):
    assert path.stat().st_size < 3000
    assert problems(path) == []


def test_a_changed_bit_in_any_byte_is_found(path):
    content = path.read_bytes()
    draw = random.Random(20)
    missed = []
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        if not is_found(path):
            missed.append((position, content[position], flipped[position]))
    assert missed == []


def test_any_other_byte_in_the_header_is_found(path):
    content = path.read_bytes()
    draw = random.Random(21)
    for _ in range(300):
        position = draw.randrange(8, 8 + int.from_bytes(content[:8], "little"))
        new = draw.choice([byte for byte in b' 0aA"\\{}[],:\x00\xff' if byte != content[position]])
        path.write_bytes(content[:position] + bytes([new]) + content[position + 1 :])
        assert is_found(path), (position, new)


def test_the_changed_tensor_is_named(path):
    content = path.read_bytes()
    last = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(last)
    assert problems(path) == ["tensor fc.bias: its data was changed after it was written"]


def test_a_change_of_the_manifest_alone_is_found(path):
    changed(path, b'\\"relative_error\\":0.125', b'\\"relative_error\\":0.025')
    assert problems(path) == ["its header was changed after it was written"]


def test_a_renamed_tensor_is_found(path):
    changed(path, b'"fc.bias"', b'"fc.base"')
    assert problems(path) == ["its header was changed after it was written"]


def test_a_file_without_manifest_is_no_reason_to_crash(tmp_path):
    path = tmp_path / "plain.safetensors"
    shards.write(path, Contents([], {}, None), Layout(None))
    assert problems(path) == ["it has no tcompress manifest"]


def hashes_replaced(path, replacement):
    """Put other text of the same length in place of the hashes."""
    content = path.read_bytes()
    found = re.search(rb'\\"hashes\\":\{.*?\}', content)
    text = replacement.encode()
    path.write_bytes(content.replace(found[0], text + b" " * (len(found[0]) - len(text))))
    return path


@pytest.mark.parametrize(
    "hashes",
    [
        r"\"other\":{}",
        r"\"hashes\":{}",
        r"\"hashes\":[]",
        r"\"hashes\":null",
        r"\"hashes\":{\"tensors\":7,\"header\":\"a\"}",
        r"\"hashes\":{\"tensors\":\"a\"}",
    ],
)
def test_missing_hashes_are_damage(path, hashes):
    assert problems(hashes_replaced(path, hashes)) == ["its manifest has no hashes"]


@pytest.mark.parametrize(
    ("digest", "problem"),
    [
        ("", "the hash of its header is damaged"),
        ("0", "the hash of its header is damaged"),
        (" " * 32, "the hash of its header is damaged"),
        (r"\\u00e4" * 2 + "0" * 30, "the hash of its header is damaged"),
        ("f" * 32, "its header was changed after it was written"),
    ],
)
def test_hashes_that_are_none_are_damage(path, digest, problem):
    hashes_replaced(path, rf"\"hashes\":{{\"tensors\":\"\",\"header\":\"{digest}\"}}")
    assert problems(path) == [problem, "it has not one hash for each tensor"]


def test_a_header_hash_of_half_characters_is_refused(path):
    hashes_replaced(path, r"\"hashes\":{\"tensors\":\"\",\"header\":\"" + r"\\ud800" * 12 + r"\"}")
    assert is_found(path)
