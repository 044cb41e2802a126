"""Safetensors files and folders of them: headers, offsets, indexes, names, and what is odd but legal."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tests.hostile.case import dense, entry, file_of, framed, refused, tensors_of, weight

NO_FILE = "is truncated or not a safetensors file"
NO_JSON = "its JSON cannot be read"
DIGITS = b"9" * 5000
T = b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'

FRAMES = {
    "empty file": (b"", NO_FILE),
    "seven bytes": (b"\x01" * 7, NO_FILE),
    "header of nothing": (bytes(8), NO_JSON),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", NO_FILE),
    "header of 2^63 bytes": ((1 << 63).to_bytes(8, "little") + b"{}", NO_FILE),
    "header of 2^64-1 bytes": (b"\xff" * 8 + b"{}" * 50, NO_FILE),
    "plain text": (b"hello world, I am a text", NO_FILE),
    "zip called safetensors": (b"PK\x03\x04" + bytes(60), NO_FILE),
    "header is an array": (framed(b"[]"), "its JSON is not an object"),
    "header is followed by another": (framed(b"{} {}"), NO_JSON),
    "header is UTF-16": (framed("{}".encode("utf-16-le")), NO_JSON),
    "header is no UTF-8": (framed(b'{"\xff": 1}'), NO_JSON),
    "header has half a character": (framed(b'{"\\ud800": 1}'), NO_JSON),
    "header has a BOM": (framed(b"\xef\xbb\xbf{}"), NO_JSON),
    "header has leading spaces": (framed(b"  " + T + b"}", bytes(8)), "its JSON is not an object"),
    "header has NaN": (framed(b'{"t": NaN}'), "a number in it is not finite"),
    "header has 1e999": (framed(b'{"t": 1e999}'), "a number in it is not finite"),
    "header has a number of 5000 digits": (framed(b'{"t": ' + DIGITS + b"}"), "Exceeds the limit"),
    "nested objects": (framed(b'{"a":' * 100_000), "recursion"),
    "nested arrays": (framed(b'{"a":' + b"[" * 100_000), "recursion"),
    "three million values": (framed(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), "more than 3000000 values"),
    "tensor twice": (framed(T + b"," + T[1:] + b"}", bytes(8)), "a name stands there twice"),
    "metadata twice": (framed(b'{"__metadata__":{"a":"1","a":"2"}}'), "a name stands there twice"),
    "metadata is a list": (framed({"__metadata__": []}), "its metadata must map strings to strings"),
    "trailing bytes": (framed(T + b"}", bytes(9)), "8 bytes of data declared, 9 there"),
    "missing bytes": (framed(T + b"}", bytes(7)), "8 bytes of data declared, 7 there"),
    "no data at all": (framed(T + b"}"), "8 bytes of data declared, 0 there"),
}
for name, (content, problem) in FRAMES.items():
    refused(name, file_of(content), problem, code=5 if "million" in name else 4)

SHAPE = "its shape is not a short list of sizes"
LARGE = "its shape is larger than any memory"
LACKS = "its header entry lacks dtype, shape or data_offsets"
ENTRIES: dict[str, tuple[object, str]] = {
    "entry is null": (None, LACKS),
    "entry without shape": ({"dtype": "F32", "data_offsets": [0, 8]}, LACKS),
    "shape is a number": (entry(2), LACKS),
    "offsets are floats": (entry(offsets=[0.0, 8.0]), LACKS),
    "type is a number": (entry(dtype=32), LACKS),
    "type is unknown": (entry(dtype="F128"), "its values are of the unknown type F128"),
    "type is control characters": (entry(dtype="F\x1b[31m\n"), r"unknown type F\x1b[31m\n"),
    "type of another width": (entry(dtype="F64"), "lies at bytes 0 to 8, but 16 bytes"),
    "negative sizes": (entry([-1, -2]), SHAPE),
    "size of true": (entry([True, 2]), SHAPE),
    "65 dimensions": (entry([1] * 64 + [2]), SHAPE),
    "100000 dimensions": (entry([1] * 100_000), SHAPE),
    "sizes that overflow 64 bits": (entry([1 << 32, 1 << 32, 2]), LARGE),
    "sizes that wrap round to 2": (entry([(1 << 64) + 2]), LARGE),
    "zero times too much": (entry([0, 1 << 62, 1 << 62], [0, 0]), LARGE),
    "size of 4000 digits": (entry([int("9" * 4000)]), LARGE),
    "terabyte over 8 bytes": (entry([1 << 19, 1 << 19]), "lies at bytes 0 to 8, but 1099511627776 bytes"),
    "negative offset": (entry(offsets=[-8, 0]), "lies at bytes -8 to 0"),
    "reversed offsets": (entry(offsets=[8, 0]), "lies at bytes 8 to 0"),
    "data begins with a hole": (entry(offsets=[1, 9]), "lies at bytes 1 to 9"),
}
for name, (described, problem) in ENTRIES.items():
    refused(name, file_of(framed({"t": described}, bytes(8))), problem, tensor="t")
for name, offsets in {
    "overlap": [4, 12],
    "the same bytes": [0, 8],
    "hole": [12, 20],
    "offset 2^64": [8, 1 << 64],
}.items():
    refused(name, file_of(framed({"t": entry(), "u": entry(offsets=offsets)}, bytes(16))), "lies at", tensor="u")
refused("control characters in a damaged tensor's name", file_of(framed({"a\n\x1b[2J": 0})), tensor=r"a\n\x1b[2J")
refused("right-to-left override in a damaged tensor's name", file_of(framed({"a\u202eb": 0})), tensor=r"a\u202eb")
refused("workflow command as a damaged tensor's name", file_of(framed({"\n::error::x": 0})), tensor=r"\n::error::x")
refused("name of 100 KB of a damaged tensor", file_of(framed({"n" * 100_000: 0})), LACKS)


# Files that are no files.


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "model.safetensors")
    return folder / "model.safetensors"


def link_to(target: str, name: str = "model.safetensors") -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return build


def two_files(folder: Path) -> Path:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(tensors_of({"fc.weight": weight()}))
    return folder


def folder_of_a_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "weights.pt")
    return folder


refused("FIFO", fifo, "is not a regular file")
refused("link to /dev/zero", link_to("/dev/zero"), "is not a regular file")
refused("link to /dev/zero called pt", link_to("/dev/zero", "model.pt"), "is not a regular file")
refused("link to nowhere", link_to("nowhere"), "there is no such file or folder")
refused("link to itself", link_to("model.safetensors"), "there is no such file or folder")
refused("link to a secret", link_to("/etc/passwd"), NO_FILE)
refused("nothing", lambda folder: folder / "model.safetensors", "there is no such file or folder")
refused("empty folder", lambda folder: folder, "holds no checkpoint")
refused("folder of two checkpoints", two_files, "holds several checkpoints")
refused("folder of a FIFO", folder_of_a_fifo, "is not a regular file")


# Shards.

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = {FIRST: ("a.weight",), SECOND: ("b.weight", "b.bias")}
MAP = {name: shard for shard, names in SHARDS.items() for name in names}


def sharded(
    weight_map: object = None, index: bytes | None = None, shards: Mapping[str, tuple[str, ...]] = SHARDS
) -> Callable[[Path], Path]:
    """Return a builder of a folder with an index; outside it lies a checkpoint that must not be read."""

    def build(folder: Path) -> Path:
        outside, model = folder / "outside", folder / "model"
        outside.mkdir()
        model.mkdir()
        (outside / "secret.safetensors").write_bytes(tensors_of({"a.weight": weight()}))
        for number, (shard, names) in enumerate(shards.items()):
            tensors = {name: weight(seed=number) if "weight" in name else torch.ones(48) for name in names}
            (model / shard).write_bytes(tensors_of(tensors))
        content = {"metadata": {}, "weight_map": MAP if weight_map is None else weight_map}
        (model / INDEX).write_bytes(json.dumps(content).encode() if index is None else index)
        return model

    return build


def moved(name: str, target: object) -> dict[str, object]:
    return {**MAP, name: target}


def with_absolute_path(folder: Path) -> Path:
    secret = str(folder / "outside" / "secret.safetensors")
    return sharded(moved("a.weight", secret))(folder)


def with_shard(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Return a builder of a folder whose first shard is something else."""

    def build(folder: Path) -> Path:
        model = sharded()(folder)
        (model / FIRST).unlink()
        make(model / FIRST)
        return model

    return build


def with_index_of_70_mb(folder: Path) -> Path:
    model = sharded()(folder)
    os.truncate(model / INDEX, 70 << 20)
    return model


def with_fifo_as_index(folder: Path) -> Path:
    model = sharded()(folder)
    (model / INDEX).unlink()
    os.mkfifo(model / INDEX)
    return model / INDEX


dense("sound shards", sharded())
dense("shard is a link to elsewhere", with_shard(lambda path: path.symlink_to("../outside/secret.safetensors")))
NO_NAME = "as its shard, which is no plain file name"
for target in ("../outside/secret.safetensors", "..", "", "/etc/passwd", "a\nb", "\x1b[2J", "a" * 300, 7):
    refused(f"shard {str(target)[:40]!r}", sharded(moved("a.weight", target)), NO_NAME, tensor="a.weight")
refused("shard by an absolute path", with_absolute_path, NO_NAME, tensor="a.weight")
refused("shard is the index", sharded(moved("a.weight", INDEX)), "is not a file that torch.save wrote")
refused("shard is missing", sharded(moved("a.weight", "gone.safetensors")), "shards that are not there: gone")
refused("shard is a FIFO", with_shard(os.mkfifo), "shards that are not there")
refused("shard is a device", with_shard(lambda path: path.symlink_to("/dev/zero")), "shards that are not there")
refused("shard is a folder", with_shard(Path.mkdir), "shards that are not there")
refused("shard is damaged", with_shard(lambda path: path.write_bytes(b"x" * 99)), NO_FILE)
refused("tensor in two shards", sharded(shards={**SHARDS, FIRST: ("a.weight", "b.bias")}), "and again", tensor="b.bias")
refused("tensor in no shard", sharded({**MAP, "c": FIRST}), f"is not in {FIRST}", tensor="c")
refused("tensor in the other shard", sharded(moved("b.bias", FIRST)), f"is not in {FIRST}", tensor="b.bias")
refused("tensor that no index names", sharded(shards={**SHARDS, FIRST: ("a.weight", "x")}), "lies in", tensor="x")
INDEXES = {
    "index is empty": (b"", NO_JSON),
    "index is no JSON": (b"{'weight_map': {}}", NO_JSON),
    "index is a list": (b"[]", "its JSON is not an object"),
    "index without map": (b"{}", "has no weight_map"),
    "index of an empty map": (b'{"weight_map": {}}', "has no weight_map"),
    "index names a tensor twice": (b'{"weight_map": {"a": "x", "a": "y"}}', "a name stands there twice"),
    "index is nested": (b'{"a":' * 100_000, "recursion"),
    "index is no text": (b"\xff\xfe", NO_JSON),
}
for name, (content, problem) in INDEXES.items():
    refused(name, sharded(index=content), INDEX, problem)
refused("index of 70 MB", with_index_of_70_mb, "too large for an index")
refused("index is a FIFO", with_fifo_as_index, "is not a regular file")


# Odd but legal.

MARKUP = "[red]x[/red][/].weight"
ODD_NAMES = {
    "escape sequences": "\x1b[31m\x1b]0;title\x07.weight",
    "line ends": "a\nb\r\nc\u2028d\u2029e.weight",
    "right-to-left override": "a\u202eb\u2066c.weight",
    "GitHub command": "::error file=x::gotcha.weight",
    "GitHub command behind spaces": "  ::set-output name=x::y.weight",
    "GitHub command behind a line end": "x\n::add-mask::e.weight",
    "old GitHub command": "##[set-output name=x;]y.weight",
    "Azure command": "##vso[task.setvariable variable=x]y.weight",
    "GitHub command where a line folds": "x" * 40 + " ::error::y" * 30 + ".weight",
    "GitHub command where words fold": "::error::" * 60 + ".weight",
    "markup": MARKUP,
    "NUL": "a\0b.weight",
    "no name": "",
    "name like a path": "../../etc/passwd.weight",
    "formula": "=cmd|' /C calc'!A0.weight",
    "wide and combining characters": "\u5b57\u0301\u200b\U0001f600.weight",
    "name of 100 KB": "n" * 100_000 + ".weight",
    "name of the metadata key": "tcompress.weight",
    "name of a group": "shared.g.core.weight",
}
for name, odd in ODD_NAMES.items():
    named = {odd: weight(), "plain.weight": weight(seed=1), "bias": torch.ones(3)}
    dense(f"name: {name}", file_of(tensors_of(named)))


def odd_metadata(folder: Path) -> Path:
    content = tensors_of({"fc.weight": weight()}, {"format": "pt\x1b[31m\n::error::x", "": "", "\x1b": "x" * 100_000})
    return file_of(content)(folder)


dense("metadata of control characters", odd_metadata)

NO_LAYER = "no layer matches"
BYTES = torch.arange(64, dtype=torch.uint8)
TYPES = {
    torch.bool: BYTES % 2 == 0,
    torch.complex64: torch.ones(4, 4, dtype=torch.complex64),
    **{t: BYTES.view(t) for t in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16)},
    **{t: BYTES.view(t) for t in (torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)},
}
ODD: dict[str, dict[str, torch.Tensor]] = {
    "zero sizes": {"fc.weight": weight(), "a.weight": torch.empty(0, 4), "b.weight": torch.empty(3, 0, 2)},
    "scalars": {"fc.weight": weight(), "steps": torch.tensor(7), "scale.weight": torch.tensor(0.5)},
    "64 dimensions": {"fc.weight": weight(), "a.weight": torch.ones([1] * 63 + [2])},
    "every type": {"fc.weight": weight(), **{f"{str(t)[6:]}.weight": values for t, values in TYPES.items()}},
    "weights in every floating type": {
        f"{str(t)[6:]}.weight": weight().to(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    },
    "zero weights": {"fc.weight": torch.zeros(48, 40), "conv.weight": torch.zeros(16, 8, 3, 3)},
    "constant weights": {"fc.weight": torch.ones(48, 40), "conv.weight": torch.ones(16, 8, 3, 3)},
    "one row": {"a.weight": torch.ones(1, 500), "b.weight": torch.ones(500, 1), "c.weight": torch.ones(1, 1)},
    "one by one kernels": {"a.weight": weight()[:, :, None, None], "b.weight": torch.ones(64, 1, 1, 1, 1)},
    "largest numbers": {"fc.weight": weight() * 1e30, "wide.weight": weight().double() * 1e300},
    "names of factors": {"fc.weight": weight(), "fc.weight.left": torch.ones(2), "fc.weight.right": torch.ones(2)},
    "names within names": {"fc": torch.ones(2), "fc.weight": weight(), "fc.weight.weight": weight(seed=1)},
}
for name, tensors in ODD.items():
    dense(name, file_of(tensors_of(tensors)))
dense("spaces in the file's name", file_of(tensors_of({"fc.weight": weight()}), "a  b \u0444 [red].safetensors"))
dense("control characters in the file's name", file_of(tensors_of({"fc.weight": weight()}), "a\x1b[31m\n.safetensors"))
dense("safetensors called pt", file_of(tensors_of({"fc.weight": weight()}), "model.pt"))
dense(
    "bytes of true that are 255",
    file_of(framed({"t.weight": entry([8], dtype="BOOL")}, b"\xff" * 8)),
    NO_LAYER,
    analyze=2,
    compress=2,
)
dense(
    "half-byte types", file_of(framed({"t.weight": entry([16], dtype="F4")}, bytes(8))), NO_LAYER, analyze=2, compress=2
)
dense("no tensors", file_of(framed({})), NO_LAYER, analyze=2, compress=2)
dense(
    "only biases",
    file_of(tensors_of({"a.bias": torch.ones(9), "b.bias": torch.ones(9)})),
    NO_LAYER,
    analyze=2,
    compress=2,
)
for name, value in {"NaN": float("nan"), "infinity": float("inf")}.items():
    spoilt = weight()
    spoilt[3, 3] = value
    content = tensors_of({"a.weight": weight(), "fc.weight": spoilt})
    dense(name, file_of(content), "tensor fc.weight: ", "NaN or Inf", analyze=6, compress=6)
dense("NaN in a bias", file_of(tensors_of({"a.weight": weight(), "a.bias": torch.full((48,), float("nan"))})))


def folder_with_hostile_companions(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(tensors_of({"fc.weight": weight()}))
    (folder / "config.json").write_text("{}")
    (folder / "passwd.json").symlink_to("/etc/passwd")
    (folder / "zero.json").symlink_to("/dev/zero")
    (folder / "loop").symlink_to(".")
    (folder / "::error::\x1b[31m\n.bin").write_bytes(b"x")
    os.mkfifo(folder / "pipe.json")
    return folder


dense("hostile files beside the model", folder_with_hostile_companions)
