"""What compressed files look like from outside: names, index, manifest and hashes as FORMAT.md has them."""

from __future__ import annotations

import base64
import json

import pytest
import torch
from safetensors.torch import load_file
from xxhash import xxh3_128

from tcompress.checkpoint import shards
from tcompress.checkpoint.dtypes import BY_NAME, BY_TORCH
from tcompress.checkpoint.integrity import sha256_of_file, sha256_of_files
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.manifest import Entry, Factor, Manifest, read_manifest
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.shards import Contents, Layout
from tcompress.checkpoint.writer import Piece

STEM = "model.tcompress"
ONE, TWO = f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"


def entry(rank):
    factors = {"left": Factor("dense"), "right": Factor("bitmask", (rank, 4))}
    return Entry("svd", {"rank": rank}, LayerKind.LINEAR, (6, 4), BY_NAME["float32"], 2.5, 0.125, factors)


MANIFEST = Manifest(
    writer="tcompress 0",
    source={"sha256": "0" * 64, "bytes": 192},
    tied={"head.weight": "b.weight"},
    rebuild={"svd": "(left @ right).reshape(shape)"},
    layers={"a.weight": entry(1), "b.weight": entry(2)},
)


def contents(manifest=MANIFEST):
    pieces = []
    for layer, rank in (("a.weight", 1), ("b.weight", 2)):
        parts = {
            "left": torch.arange(6.0 * rank).reshape(6, rank),
            "right.values": torch.ones(4),
            "right.mask": torch.tensor([15] * ((4 * rank + 7) // 8), dtype=torch.uint8),
        }
        for part, tensor in parts.items():
            data = lambda tensor=tensor: bytes_of(tensor)  # noqa: E731
            pieces.append(Piece(f"{layer}.{part}", BY_TORCH[tensor.dtype], tuple(tensor.shape), group=layer, data=data))
    pieces.append(Piece("empty", BY_NAME["float16"], (0, 3), "empty", lambda: memoryview(b"")))
    return Contents(pieces, {"format": "pt"}, manifest)


LAYOUTS = {
    "one file": Layout(STEM),
    "two shards": Layout(STEM, shard_bytes=70),
    "one shard": Layout(STEM, shard_bytes=10_000, indexed=True),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@every_layout
@pytest.mark.parametrize("manifest", [MANIFEST, None], ids=["compressed", "plain"])
def test_the_bytes_of_all_files_were_known_before(tmp_path, layout, manifest):
    shards.write(tmp_path, contents(manifest), layout)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == shards.planned_bytes(contents(manifest), layout)


@pytest.mark.parametrize(
    ("layout", "files"),
    [
        ("one file", {f"{STEM}.safetensors"}),
        ("two shards", {ONE, TWO, f"{STEM}.safetensors.index.json", "tcompress.json"}),
        (
            "one shard",
            {f"{STEM}-00001-of-00001.safetensors", f"{STEM}.safetensors.index.json", "tcompress.json"},
        ),
    ],
)
def test_the_files_have_the_documented_names(tmp_path, layout, files):
    shards.write(tmp_path, contents(), LAYOUTS[layout])
    assert {path.name for path in tmp_path.iterdir()} == files


def test_a_file_alone_has_the_name_that_was_asked_for(tmp_path):
    path = tmp_path / "small.safetensors"
    shards.write(path, contents(), Layout(None))
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_size == shards.planned_bytes(contents(), Layout(None))


def test_the_index_and_the_manifest_beside_it_speak_of_the_whole_model(tmp_path):
    shards.write(tmp_path, contents(), LAYOUTS["two shards"])
    index = json.loads((tmp_path / f"{STEM}.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for name in (ONE, TWO) for tensor in load_file(tmp_path / name).values())
    assert index["metadata"] == {"total_size": total}
    assert {name: set(load_file(tmp_path / name)) for name in (ONE, TWO)} == {
        shard: {name for name, home in index["weight_map"].items() if home == shard} for shard in (ONE, TWO)
    }
    assert json.loads((tmp_path / "tcompress.json").read_text()) == MANIFEST.to_json()


def test_each_shard_carries_the_manifest_of_its_own_layers(tmp_path):
    shards.write(tmp_path, contents(), LAYOUTS["two shards"])
    for name, layer in ((ONE, "a.weight"), (TWO, "b.weight")):
        with open_checkpoint(tmp_path / name) as shard:
            assert read_manifest(shard) == MANIFEST.only([layer])
            assert {stored.partition(".weight")[0] for stored in shard} - {"empty"} == {layer[0]}


@every_layout
def test_the_manifest_is_read_back(tmp_path, layout):
    shards.write(tmp_path, contents(), layout)
    with open_checkpoint(tmp_path) as checkpoint:
        assert read_manifest(checkpoint) == MANIFEST


@every_layout
def test_the_same_contents_give_the_same_files(tmp_path, layout):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        shards.write(tmp_path / name, contents(), layout)
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}


@every_layout
def test_the_hashes_are_those_of_the_document(tmp_path, layout):
    shards.write(tmp_path, contents(), layout)
    for path in tmp_path.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        text = entries.pop("__metadata__")["tcompress"]
        hashes = json.loads(text)["hashes"]
        assert set(hashes) == {"tensors", "header"}
        assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
        spans = [each["data_offsets"] for each in entries.values()]
        assert spans == sorted(spans)
        digests = [xxh3_128(content[start + begin : start + end]).digest() for begin, end in spans]
        assert base64.b64decode(hashes["tensors"]) == b"".join(digests)
        blank = content[:start].replace(hashes["header"].encode(), b"0" * 32)
        assert xxh3_128(blank).hexdigest() == hashes["header"]


def test_the_sha256_of_several_files_is_that_of_sha256sums_lines(tmp_path):
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "a").write_bytes(b"abc")
    of_a = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of_file(tmp_path / "a") == of_a
    assert sha256_of_files([tmp_path / "a"]) == of_a
    # printf abc > a; : > b; sha256sum a b | sha256sum
    both = "09c7e0b8a02d027d95ec0375a600ed4ad4d6b26a1c93f16d9150cab5fec761a6"
    assert sha256_of_files([tmp_path / "b", tmp_path / "a"]) == both
