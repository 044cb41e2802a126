"""Files changed at random: read or refused in one line, and verify sees every changed byte."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import TcompressError
from tcompress.workflow.decoding import view
from tcompress.workflow.inspection import inspect
from tcompress.workflow.verification import verify
from tests.conftest import FIXTURES
from tests.hostile.case import tensors_of, weight
from tests.hostile.corpus_compressed import sealed, sound

COMPRESSED = sorted((FIXTURES / "compressed" / "v1").glob("*.safetensors"))
FLIPS = 1000
DENSE = tensors_of({"fc.weight": weight(8, 6), "fc.bias": torch.ones(8)}, {"format": "pt"})
WAYS = [
    ("dense", None),
    ("dense", "int8"),
    ("csr", None),
    ("bitmask", "int4"),
    ("delta8", None),
    ("2:4", "int8"),
    ("elias-fano:1", "int3"),
]
fuzz = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read_or_refuse(path, content):
    path.write_bytes(content)
    message = path.name
    try:
        with open_checkpoint(path) as checkpoint:
            inspect(checkpoint)
            if "tcompress" in checkpoint.metadata:
                dense = view(checkpoint)
                for name in dense.infos:
                    dense.read(name, torch.device("cpu"))
            for name in checkpoint:
                assert checkpoint.read(name).nbytes == checkpoint[name].nbytes
    except TcompressError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert path.name in message


flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@fuzz
@given(flips, st.booleans())
def test_flipped_bits_of_a_header_are_read_or_refused(tmp_path, changes, is_dense):
    content = bytearray(DENSE if is_dense else sealed(*sound("csr")))
    header = 8 + int.from_bytes(content[:8], "little")
    for place, mask in changes:
        content[int(place * header)] ^= mask
    read_or_refuse(tmp_path / "model.safetensors", bytes(content))


ODD = [
    None,
    True,
    0,
    -1,
    0.5,
    1 << 20,
    1 << 40,
    10**300,
    "",
    "x",
    "dense",
    "csr",
    "svd",
    "fc.weight",
    [],
    {},
    [[]],
    [0],
    {"a": 1},
]
edits = st.lists(
    st.tuples(st.integers(0, 1 << 30), st.sampled_from(["replace", "delete", "repeat", "nest"]), st.sampled_from(ODD)),
    min_size=1,
    max_size=3,
)


def edit(document, changes):
    """Change nodes of a JSON document, in place; each is found by its number."""
    for number, kind, value in changes:
        nodes = [(each, key) for each in parents_in(document) for key in keys_of(each)]
        if not nodes:
            return
        parent, key = nodes[number % len(nodes)]
        if kind == "delete":
            del parent[key]
        elif kind == "replace":
            parent[key] = copy.deepcopy(value)
        elif kind == "nest":
            parent[key] = [parent[key]] if number % 2 else {str(key): parent[key]}
        elif isinstance(parent, dict):
            parent[f"{key}x"] = copy.deepcopy(parent[key])
        else:
            parent.insert(key, copy.deepcopy(parent[key]))


def parents_in(node):
    if isinstance(node, dict | list):
        yield node
        for value in node.values() if isinstance(node, dict) else node:
            yield from parents_in(value)


def keys_of(node):
    return list(node) if isinstance(node, dict) else list(range(len(node)))


@fuzz
@given(edits, st.sampled_from(WAYS))
def test_an_edited_manifest_is_read_or_refused(tmp_path, changes, way):
    document, tensors = copy.deepcopy(sound(*way))
    edit(document, changes)
    read_or_refuse(tmp_path / "small.safetensors", sealed(document, tensors))


@fuzz
@given(edits)
def test_an_edited_header_is_read_or_refused(tmp_path, changes):
    content = sealed(*sound("csr"))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header, changes)
    text = json.dumps(header).encode()
    read_or_refuse(tmp_path / "small.safetensors", len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize("source", COMPRESSED, ids=lambda path: path.stem)
def test_verify_sees_every_flipped_byte(source, tmp_path):
    content, chance = source.read_bytes(), random.Random(source.stem)
    header = 8 + int.from_bytes(content[:8], "little")
    count = FLIPS // len(COMPRESSED) + 1
    places = [chance.randrange(header) for _ in range(count // 2)]
    places += [chance.randrange(header, len(content)) for _ in range(count - len(places))]
    path = tmp_path / "small.safetensors"
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            found = verify(open_checkpoint(path)).problems
        except TcompressError:
            continue
        assert found, f"byte {place} of {header} + {len(content) - header}"
