"""Compressed files that lie: their hashes are right, so that nothing but the check of the thing itself finds it."""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from xxhash import xxh3_128

from tcompress.encodings import find
from tests.hostile.case import CODES, compressed, entry, framed, raw_bytes, weight

LAYER = "fc.weight"
MATRIX = f"{LAYER}.matrix"
BLANK = "0" * 32
Document = dict
Tensors = dict[str, torch.Tensor]
Change = Callable[[Document, Tensors], object]


def sealed(text: str | Document, tensors: Tensors, *, seal: bool = True) -> bytes:
    """Return a compressed file with this manifest, in JSON or still a document, and true hashes."""
    data = {name: raw_bytes(tensor) for name, tensor in tensors.items()}
    if not isinstance(text, str):
        digests = base64.b64encode(b"".join(xxh3_128(raw).digest() for raw in data.values())).decode()
        hashes = {"hashes": {"tensors": digests, "header": BLANK}} if seal and "hashes" not in text else {}
        text = json.dumps({**text, **hashes})
    header: dict[str, object] = {"__metadata__": {"tcompress": text}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = entry(list(tensor.shape), [end, end := end + len(data[name])], CODES[tensor.dtype])
    content = framed(header)
    return content.replace(BLANK.encode(), xxh3_128(content).hexdigest().encode(), 1) + b"".join(data.values())


@lru_cache
def sound(encoding: str = "dense", values: str | None = None) -> tuple[Document, Tensors]:
    """Return a sound manifest and its tensors: one layer (24, 20), with a factor in this encoding, and a bias."""
    if encoding == "dense" and values is None:
        left, right = weight(24, 3), weight(3, 20)
        factors: dict[str, object] = {"left": "dense", "right": "dense"}
        parts, rebuilt = {"left": left, "right": right}, left @ right
        described: Document = {"format": "svd", "options": {"rank": 3}}
    else:
        rebuilt = torch.where(torch.arange(20) % 2 == 1, weight(24, 20), torch.tensor(0.0))
        coding = find(encoding, values)
        stored = coding.encode(rebuilt)
        rebuilt = coding.decode(stored, (24, 20))
        factors = {"matrix": {"encoding": encoding, "shape": [24, 20]} | ({"values": values} if values else {})}
        parts = {f"matrix.{name}": part for name, part in stored.items()}
        described = {"format": "sparse", "options": {"density": 0.5}}
    described |= {"kind": "linear", "shape": [24, 20], "dtype": "float32", "factors": factors}
    described |= {"norm": float(rebuilt.double().norm()), "relative_error": 0.0}
    source = {"sha256": "ab" * 32, "bytes": 2000}
    document = {
        "version": 1,
        "writer": "w 1",
        "source": source,
        "tied": {},
        "rebuild": {},
        "layers": {LAYER: described},
    }
    return document, {**{f"{LAYER}.{name}": part for name, part in parts.items()}, "fc.bias": torch.ones(24)}


def small(change: Change | None = None, encoding: str = "dense", values: str | None = None) -> Callable[[Path], Path]:
    """Return a builder of a sound file, or of one that ``change`` has been at."""

    def build(folder: Path) -> Path:
        document, tensors = copy.deepcopy(sound(encoding, values))
        if change is not None:
            change(document, tensors)
        (folder / "small.safetensors").write_bytes(sealed(document, tensors))
        return folder / "small.safetensors"

    return build


WAYS = [
    (encoding, values)
    for encoding in ("dense", "bitmask", "elias-fano:1", "delta8", "csr", "2:4")
    for values in (None, "int8", "int4", "int3")
]
for encoding, values in WAYS:
    compressed(f"sound {encoding} {values or ''}", small(None, encoding, values), decompress=0, verify=0)


# Data of factors. The header alone does not show it: inspect answers, the others name the layer.


def put(part: str, at: int, value: float) -> Change:
    def change(_: Document, tensors: Tensors) -> None:
        tensors[f"{MATRIX}.{part}"].reshape(-1)[at] = value

    return change


def part(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(_: Document, tensors: Tensors) -> None:
        tensors[f"{MATRIX}.{name}"] = make(tensors[f"{MATRIX}.{name}"])

    return change


def wrong(name: str, encoding: str, values: str | None, change: Change, problem: str) -> None:
    compressed(name, small(change, encoding, values), f"tensor {LAYER}: ", problem)


def unordered(_: Document, tensors: Tensors) -> None:
    columns = tensors[f"{MATRIX}.columns"]
    columns[0], columns[1] = int(columns[1]), int(columns[0])


wrong("csr column out of range", "csr", None, put("columns", 3, 20), "has column numbers outside 0 to 19")
wrong("csr column of 65535", "csr", None, put("columns", -1, 65535), "has column numbers outside 0 to 19")
wrong("csr columns that fall", "csr", None, unordered, "do not rise within a row")
wrong("csr columns that repeat", "csr", None, put("columns", 1, 1), "do not rise within a row")
wrong("csr columns of another type", "csr", None, part("columns", lambda t: t.int()), "column numbers that are not")
wrong("csr columns in two dimensions", "csr", None, part("columns", lambda t: t[None]), "no plain list")
wrong("csr columns cut off", "csr", None, part("columns", lambda t: t[:-1]), "row starts that do not rise")
wrong("csr starts that fall", "csr", None, put("row_starts", 3, 0), "row starts that do not rise")
wrong("csr starts below zero", "csr", None, put("row_starts", 0, -1), "row starts that do not rise")
wrong("csr starts of 2^63-1", "csr", None, put("row_starts", 3, (1 << 63) - 1), "row starts that do not rise")
wrong("csr starts that wrap", "csr", None, put("row_starts", 3, -(1 << 63)), "row starts that do not rise")
wrong("csr ends early", "csr", None, put("row_starts", -1, 7), "row starts that do not rise")
wrong("csr starts missing", "csr", None, part("row_starts", lambda t: t[1:]), "has not 25 row starts")
wrong("csr starts of nothing", "csr", None, part("row_starts", lambda t: t[:0]), "has not 25 row starts")
wrong("csr values missing", "csr", None, part("values", lambda t: t[1:]), "has values of shape")
wrong("csr values of integers", "csr", None, part("values", lambda t: t.to(torch.int32)), "is of type torch.int32")
wrong("csr values of complex numbers", "csr", None, part("values", lambda t: t.to(torch.complex64)), "is of type")
wrong("bitmask of one bit more", "bitmask", None, put("mask", 0, 0xFF), "has values of shape")
wrong("bitmask of none", "bitmask", None, part("mask", torch.zeros_like), "no places for them: its mask")
wrong("bitmask of all", "bitmask", "int8", part("mask", lambda t: torch.full_like(t, 255)), "has codes of shape")
wrong("bitmask cut off", "bitmask", None, part("mask", lambda t: t[:-1]), "has no bit for each of")
wrong("bitmask of signed bytes", "bitmask", None, part("mask", lambda t: t.view(torch.int8)), "has no bit for each of")
wrong("positions of one more", "elias-fano:1", None, put("positions", -1, 255), "has not the bits of")
wrong("positions of none", "elias-fano:1", None, part("positions", torch.zeros_like), "has not the bits of")
wrong("positions cut off", "elias-fano:1", "int8", part("positions", lambda t: t[:-1]), "has not the bits of")
wrong("positions of nothing", "elias-fano:0", "int4", part("positions", lambda t: t[:0]), "its positions tell of none")
wrong(
    "positions in two dimensions", "elias-fano:1", None, part("positions", lambda t: t[None]), "no plain list of bytes"
)
wrong("positions of integers", "elias-fano:1", "int4", part("positions", torch.Tensor.int), "no plain list of bytes")
wrong("a million bits", "elias-fano:1", None, part("positions", lambda t: t.repeat(99_999)), "has not the bits of")
wrong("gaps beyond the end", "delta8", None, put("gaps", 5, 254), "reach beyond its last element")
wrong("gap after the last value", "delta8", None, put("gaps", -1, 255), "has a gap after its last value")
wrong("gaps of one value less", "delta8", None, put("gaps", 0, 255), "reach beyond its last element")
wrong("gaps of none", "delta8", None, part("gaps", lambda t: t[:0]), "its gaps tell of none")
wrong("gaps in two dimensions", "delta8", "int4", part("gaps", lambda t: t.reshape(2, -1)), "no plain list of bytes")
wrong(
    "gaps of a million skips",
    "delta8",
    None,
    part("gaps", lambda _: torch.cat([torch.full((1_000_000,), 255), torch.tensor([0])]).byte()),
    "beyond its last element",
)
wrong("pattern that does not exist", "2:4", None, part("patterns", lambda t: torch.full_like(t, 255)), "none of 2:4")
wrong("patterns cut off", "2:4", "int8", part("patterns", lambda t: t[:-1]), "has not the patterns of")
wrong("patterns of integers", "2:4", None, part("patterns", lambda t: t.int()), "has not the patterns of")
for encoding in ("dense", "csr"):
    for value in (float("nan"), float("inf"), -1.0):
        wrong(
            f"int8 scale {value} in {encoding}", encoding, "int8", put("scale", 3, value), "scales that are negative or"
        )
    wrong(f"int8 code -128 in {encoding}", encoding, "int8", put("codes", 3, -128), "has codes below -127")
    wrong(f"int8 codes missing in {encoding}", encoding, "int8", part("codes", lambda t: t[1:]), "has codes of shape")
    wrong(f"int8 scales missing in {encoding}", encoding, "int8", part("scale", lambda t: t[1:]), "has not 24 scales")
    wrong(
        f"int4 scale NaN in {encoding}", encoding, "int4", put("scale", 0, float("nan")), "scales that are not finite"
    )
    wrong(
        f"int3 scale NaN in {encoding}", encoding, "int3", put("scale", -1, float("nan")), "scales that are not finite"
    )
    wrong(f"int3 offset of -1 in {encoding}", encoding, "int3", put("scale", 0, -1.0), "an offset that is negative")
    wrong(f"int3 codes missing in {encoding}", encoding, "int3", part("codes", lambda t: t[1:]), "has not the codes of")
    wrong(f"int4 codes missing in {encoding}", encoding, "int4", part("codes", lambda t: t[1:]), "has not the codes of")
    wrong(
        f"int4 scales missing in {encoding}",
        encoding,
        "int4",
        part("scale", lambda t: t[1:]),
        "scales in torch.float16",
    )
wrong("int8 scales of doubles", "dense", "int8", part("scale", torch.Tensor.double), "has not 24 scales")
wrong("int8 codes without sign", "dense", "int8", part("codes", lambda t: t.view(torch.uint8)), "not torch.int8")


def factor(name: str, tensor: torch.Tensor) -> Change:
    def change(_: Document, tensors: Tensors) -> None:
        tensors[f"{LAYER}.{name}"] = tensor

    return change


FACTORS = {
    "rank that differs": torch.ones(24, 4),
    "rank of 100000": torch.ones(24, 100_000),
    "of one row less": torch.ones(23, 3),
    "of 64 dimensions": torch.ones([24, 3] + [1] * 62),
    "scalar": torch.tensor(1.0),
    "empty": torch.ones(24, 0),
    "of integers": torch.ones(24, 3, dtype=torch.int64),
    "of complex numbers": torch.ones(24, 3, dtype=torch.complex64),
}
for name, tensor in FACTORS.items():
    compressed(f"factor {name}", small(factor("left", tensor)), f"tensor {LAYER}: ")
NOT_A_NUMBER = torch.full((24, 3), float("nan"))
compressed("factor of NaN", small(factor("left", NOT_A_NUMBER)), LAYER, "NaN or Inf", decompress=0)
compressed("factor of infinities", small(factor("left", NOT_A_NUMBER.nan_to_num(float("inf")))), LAYER, decompress=0)
compressed(
    "factor of eight-bit floats", small(factor("left", torch.ones(24, 3).to(torch.float8_e4m3fn))), LAYER, decompress=0
)


# Manifests.


def whole(**values: object) -> Change:
    return lambda document, _: document.update(values)


def of_layer(**values: object) -> Change:
    return lambda document, _: document["layers"][LAYER].update(values)


def without(name: str) -> Change:
    return lambda document, _: document.pop(name)


def layer_without(name: str) -> Change:
    return lambda document, _: document["layers"][LAYER].pop(name)


def lying(name: str, change: Change, *problem: str, **codes: int) -> None:
    """Add a manifest that no command takes."""
    compressed(name, small(change), *problem, **{"inspect": 4, "verify": 4, **codes})


def text_of(text: str) -> Callable[[Path], Path]:
    """Return a builder of a file whose manifest is this text."""

    def build(folder: Path) -> Path:
        (folder / "small.safetensors").write_bytes(sealed(text, sound()[1]))
        return folder / "small.safetensors"

    return build


TEXTS = {
    "nothing": ("", "its tcompress manifest's JSON cannot be read"),
    "no JSON": ("{'version': 1}", "its tcompress manifest's JSON cannot be read"),
    "a list": ("[1]", "its tcompress manifest's JSON is not an object"),
    "a number": ("1", "its tcompress manifest's JSON is not an object"),
    "nested": ('{"version":' * 100_000, "recursion"),
    "lists in lists": ('{"version":' + "[" * 100_000, "recursion"),
    "NaN": ('{"version": NaN}', "a number in it is not finite"),
    "1e999": ('{"version": 1e999}', "a number in it is not finite"),
    "a name twice": ('{"version": 1, "version": 1}', "a name stands there twice"),
    "5000 digits": ('{"version": ' + "9" * 5000 + "}", "Exceeds the limit"),
    "half a character": ('{"\\ud800": 1}', "its tcompress manifest's JSON cannot be read"),
    "an empty object": ("{}", "has no version"),
}
for name, (text, problem) in TEXTS.items():
    compressed(f"manifest is {name}", text_of(text), problem, inspect=4, verify=4)
for version in (0, True, "1", None, [1]):
    lying(f"version {version!r}", whole(version=version), "has no version")
for version in (2, 9**300):
    lying(f"version {str(version)[:5]}", whole(version=version), "a newer one is needed", "written by w 1")
lying("version 2 by control characters", whole(version=2, writer="\x1b[2J\n::error::x"), r"written by \x1b[2J\n::")
LACKING = "lacks writer, source, tied, rebuild or layers"
for name in ("writer", "source", "tied", "rebuild", "layers"):
    lying(f"manifest without {name}", without(name), LACKING)
lying("manifest whose layers are a list", whole(layers=[]), LACKING)
DAMAGED = (f"tensor {LAYER}: ", "its manifest entry is damaged")
for name in ("format", "options", "kind", "shape", "dtype", "norm", "relative_error", "factors"):
    lying(f"layer without {name}", layer_without(name), *DAMAGED)
for value in ("x", [], None):
    lying(
        f"layer that is {value!r}", lambda document, _, value=value: document["layers"].update({LAYER: value}), *DAMAGED
    )
for value in (-1, True, 9**420):
    lying(f"error of {str(value)[:9]}", of_layer(relative_error=value), *DAMAGED)
    lying(f"norm of {str(value)[:9]}", of_layer(norm=value), *DAMAGED)
for name in ("relative_error", "norm"):
    for digits in ("1e999", "NaN"):
        document = copy.deepcopy(sound()[0])
        document["layers"][LAYER][name] = 12345
        text = json.dumps(document).replace("12345", digits)
        compressed(
            f"{name} of {digits[:9]}",
            text_of(text),
            "its tcompress manifest's JSON cannot be read",
            inspect=4,
            verify=4,
        )
for value in (1e300, 1.0):
    compressed(f"norm of {value}", small(of_layer(norm=value)), f"tensor {LAYER}: ", "further apart", decompress=0)
for value in ([-24, -20], [24.0, 20.0], [True, 20], ["24", "20"], "24x20", 480, [1 << 40, 1 << 40], [1] * 65):
    lying(f"dense shape {str(value)[:30]}", of_layer(shape=value), *DAMAGED)
TOO_MUCH = [1 << 30, 1 << 30]
for name in ("svd", "cp", "sparse"):
    claimed = of_layer(shape=TOO_MUCH, format=name, options={"density": 0.1} if name == "sparse" else {"rank": 1})
    compressed(f"exabytes of {name}", small(claimed), "bytes", decompress=5)
compressed("dense shape of another size", small(of_layer(shape=[20, 24])), f"tensor {LAYER}: ")
compressed("dense shape of no size", small(of_layer(shape=[0, 20])), f"tensor {LAYER}: ")
compressed("dense shape of nothing", small(of_layer(shape=[])), f"tensor {LAYER}: ")
compressed("dense shape of 64 dimensions", small(of_layer(shape=[24, 20] + [1] * 62)), decompress=0, verify=0)


def thin(document: Document, tensors: Tensors) -> None:
    """10 GB out of 400 KB, as a rank of 1 can have it: legal to say, and too much to build."""
    document["layers"][LAYER].update(shape=[50_000, 50_000], options={"rank": 1})
    tensors |= {f"{LAYER}.left": torch.ones(50_000, 1), f"{LAYER}.right": torch.ones(1, 50_000)}


def no_positions(document: Document, tensors: Tensors) -> None:
    thin_sparse(document, tensors)
    del tensors[f"{MATRIX}.gaps"]
    tensors[f"{MATRIX}.positions"] = torch.zeros(0).byte()


def thin_sparse(document: Document, tensors: Tensors) -> None:
    document["layers"][LAYER].update(shape=[50_000, 50_000])
    document["layers"][LAYER]["factors"]["matrix"]["shape"] = [50_000, 50_000]
    tensors |= {f"{MATRIX}.gaps": torch.zeros(0).byte(), f"{MATRIX}.values": torch.zeros(0)}


compressed("ten gigabytes of rank 1", small(thin), LAYER, decompress=5, verify=8)
compressed("ten gigabytes of positions", small(no_positions, "elias-fano:9"), LAYER, decompress=5, verify=8)
compressed("ten gigabytes of gaps", small(thin_sparse, "delta8"), LAYER, decompress=5, verify=8)


lying("unknown format", of_layer(format="magic\x1b"), f"tensor {LAYER}: ", r"has format 'magic\x1b'", "does not know")
lying("unknown type", of_layer(dtype="float31"), *DAMAGED)
lying("type of integers", of_layer(dtype="int64"), f"tensor {LAYER}: ", "claims factors for int64 values")
lying("unknown kind", of_layer(kind="magic"), *DAMAGED)
compressed("unknown option", small(of_layer(options={"rank": 3, "magic": 1})), LAYER, "senseless options", inspect=4)
ODD_OPTIONS = {
    "a rank of 0": {"rank": 0},
    "a rank of true": {"rank": True},
    "a rank of text": {"rank": "3"},
    "a rank in an object": {"rank": {"rank": 3}},
    "no rank": {},
    "an unknown matricisation": {"rank": 3, "matricisation": "diagonal"},
    "an option of no name": {"rank": 3, "": 1},
    "control characters": {"rank": 3, "\x1b[2J\n::error::": "\x1b"},
}
for name, options in ODD_OPTIONS.items():
    compressed(f"options of {name}", small(of_layer(options=options)), LAYER, "senseless options", inspect=4)


def nested_options(document: Document, _: Tensors) -> None:
    value: object = 3
    for _ in range(600):
        value = [value]
    document["layers"][LAYER]["options"]["rank"] = value


compressed("options of 600 lists", small(nested_options), LAYER, "senseless options", inspect=4)
compressed("rank of 9^300", small(of_layer(options={"rank": 9**300})), f"tensor {LAYER}: ", decompress=0)
PARTED = "its manifest entry for factor left is damaged"
for value in (
    None,
    7,
    [],
    {},
    {"encoding": "csr"},
    {"encoding": 7, "shape": [24, 3]},
    {"encoding": "csr", "shape": [-1]},
    {"encoding": "csr", "shape": [24, 3], "values": 7},
    {"encoding": "csr", "shape": [1 << 63]},
):
    lying(f"factor that is {str(value)[:60]}", of_layer(factors={"left": value, "right": "dense"}), LAYER, PARTED)
for value in (
    "magic",
    "",
    "17:99",
    "0:4",
    "4:2",
    "2:\u0664",
    "csr",
    {"encoding": "dense", "shape": [24, 3]},
    {"encoding": "csr", "shape": [24, 3], "values": "int2"},
    {"encoding": "\x1b[2J", "shape": [24, 3]},
):
    lying(f"encoding {str(value)[:60]!r}", of_layer(factors={"left": value, "right": "dense"}), LAYER, "cannot read")
for value in ({"encoding": "csr", "shape": [24, 3]}, {"encoding": "2:4", "shape": [24, 3], "values": "int4"}):
    lying(
        f"no parts of {value['encoding']}",
        of_layer(factors={"left": value, "right": "dense"}),
        LAYER,
        "is not in the file",
    )
lying("factor that is missing", lambda _, tensors: tensors.pop(f"{LAYER}.left"), LAYER, "is not in the file")
lying("no factors", of_layer(factors={}), *DAMAGED)
compressed("factor too few", small(of_layer(factors={"left": "dense"})), f"tensor {LAYER}: ")
compressed(
    "factor that is not announced",
    small(
        lambda document, tensors: (
            document["layers"][LAYER]["factors"].update(extra="dense"),
            tensors.update({f"{LAYER}.extra": torch.ones(2)}),
        )
    ),
    f"tensor {LAYER}: ",
)
lying("factor of control characters", of_layer(factors={"\x1b[2J\n": "dense"}), r"\x1b[2J\n is not in the file")
lying(
    "layer dense and in factors",
    lambda _, tensors: tensors.update({LAYER: torch.ones(24, 20)}),
    LAYER,
    "is there dense",
)
lying(
    "two layers of the same factors",
    lambda document, _: document["layers"].update(
        {"fc": {**document["layers"][LAYER], "factors": {"weight.left": "dense"}}}
    ),
    "belongs to fc",
    f"tensor {LAYER}.left",
)
lying(
    "layer of no tensors",
    lambda document, _: document["layers"].update(other=document["layers"][LAYER]),
    "tensor other: ",
    "is not in the file",
)

TIE = "which cannot be"
TIES = {
    "tie to nowhere": {"a": "b"},
    "tie to itself": {"a": "a"},
    "tie of a layer to itself": {LAYER: LAYER},
    "ties in a circle": {"a": "b", "b": "a"},
    "ties in a row": {"a": "b", "b": LAYER},
    "tie of a tensor that is there": {"fc.bias": LAYER},
    "tie to a factor": {"a": f"{LAYER}.left"},
    "tie to nothing": {"a": ""},
    "tie of control characters": {"\x1b[2J\n": "\x1b"},
}
for name, ties in TIES.items():
    lying(name, whole(tied=ties), TIE)
for value in (None, ["a"]):
    lying(f"tie to {value!r}", whole(tied={"a": value}), "tensor a: ", "something that is no text")
    lying(f"formula {value!r}", whole(rebuild={"svd": value}), "tensor svd: ", "something that is no text")
compressed("tie to a layer", small(whole(tied={"head": LAYER})), decompress=0, verify=0)
compressed("tie of an odd name", small(whole(tied={"::error::\x1b[2J\n[red]": LAYER})), decompress=0, verify=0)
compressed("formula of control characters", small(whole(rebuild={"svd": "\x1b[2J\n::error::"})), decompress=0, verify=0)
compressed(
    "writer of control characters", small(whole(writer="x" * 150 + " ::error::\x1b[2J\n[red]")), decompress=0, verify=0
)
GROUPS = "groups without members, or members without groups"
lying("group of no members", whole(shared={"g": {"core": "dense"}}), GROUPS)
lying("member of no group", of_layer(group="g"), GROUPS)
lying("groups in a list", whole(shared=[]), GROUPS)
lying("group that is a number", of_layer(group=7), LAYER, "names a group that is no text")
lying(
    "group of no factors",
    lambda document, _: (document.update(shared={"g": {}}), of_layer(group="g")(document, _)),
    "tensor g: ",
    "entry of shared factors is damaged",
)
lying(
    "group of a format without",
    lambda document, _: (document.update(shared={"g": {"core": "dense"}}), of_layer(group="g")(document, _)),
    LAYER,
    "its format has none",
)
SOURCES: dict[str, object] = {
    "empty": {},
    "of other types": {"sha256": 7, "bytes": "\x1b[2J\n::error::x", "key": 3, "shard_bytes": "x"},
    "of nested things": {"sha256": [[["\x1b"]]], "bytes": {"a": None}},
    "of an odd key": {"key": "..\x1b[2J/../../x"},
    "of shards": {"shard_bytes": 1},
}
for name, source in SOURCES.items():
    compressed(f"source {name}", small(whole(source=source)), decompress=0, verify=0)
lying("source of a key of 100 dots", whole(source={"key": "." * 100}), "a key nested deeper than 50")
HASHES: dict[str, object] = {
    "missing": None,
    "a list": [],
    "empty": {},
    "of numbers": {"tensors": 7, "header": 7},
    "of control characters": {"tensors": "\x1b[2J\n", "header": "\x1b[2J\n"},
    "too few": {"tensors": "AAAA", "header": BLANK},
    "no base64": {"tensors": "\u00e9" * 64, "header": BLANK},
    "without header": {"tensors": base64.b64encode(bytes(48)).decode()},
    "of zeros": {"tensors": base64.b64encode(bytes(48)).decode(), "header": "1" * 32},
    "an empty header": {"tensors": base64.b64encode(bytes(48)).decode(), "header": ""},
    "a header of quotation marks": {"tensors": base64.b64encode(bytes(48)).decode(), "header": '"' * 32},
}
for name, hashes in HASHES.items():
    compressed(f"hashes {name}", small(whole(hashes=hashes)), "small.safetensors: ")


def unhashed(folder: Path) -> Path:
    (folder / "small.safetensors").write_bytes(sealed(*sound(), seal=False))
    return folder / "small.safetensors"


compressed("no hashes", unhashed, "its manifest has no hashes")


def with_a_name(name: str) -> Change:
    """Give the layer another name."""

    def change(document: Document, tensors: Tensors) -> None:
        document["layers"] = {name: document["layers"].pop(LAYER)}
        for stored in [stored for stored in tensors if stored.startswith(f"{LAYER}.")]:
            tensors[name + stored.removeprefix(LAYER)] = tensors.pop(stored)

    return change


LAYER_NAMES = ("", "::error::x", "\x1b[2J\n\r", "##vso[x]y", "[red]x[/]", "\u202eabc", "n" * 100_000, "../../x", "a\0b")
for name in LAYER_NAMES:
    compressed(f"layer called {name[:20]!r}", small(with_a_name(name)), decompress=0, verify=0)


# Folders.


def in_shards(change: Callable[[dict[str, Document]], object]) -> Callable[[Path], Path]:
    """Return a builder of a folder of two shards, after ``change`` to their manifests and to the file beside them."""

    def build(folder: Path) -> Path:
        documents: dict[str, Document] = {}
        shards, weight_map, total = {}, {}, 0
        for number in (1, 2):
            document, tensors = copy.deepcopy(sound())
            renamed = {name.replace("fc", f"fc{number}"): tensor for name, tensor in tensors.items()}
            document["layers"] = {f"fc{number}.weight": document["layers"][LAYER]}
            file = f"model.tcompress-0000{number}-of-00002.safetensors"
            documents[file], shards[file] = document, renamed
            weight_map |= dict.fromkeys(renamed, file)
            total += sum(tensor.nbytes for tensor in renamed.values())
        layers = {name: layer for document in documents.values() for name, layer in document["layers"].items()}
        documents["tcompress.json"] = {**documents[file], "layers": layers}
        change(documents)
        for file, document in documents.items():
            if file in shards:
                (folder / file).write_bytes(sealed(document, shards[file]))
            else:
                (folder / file).write_text(json.dumps(document))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.tcompress.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return build


ONE, TWO = (f"model.tcompress-0000{number}-of-00002.safetensors" for number in (1, 2))
compressed("sound shards of factors", in_shards(lambda _: None), decompress=0, verify=0)
compressed(
    "document says another thing",
    in_shards(lambda d: d["tcompress.json"].update(writer="x")),
    "tcompress.json: does not say",
    decompress=0,
)
compressed(
    "document is missing", in_shards(lambda d: d.pop("tcompress.json")), "tcompress.json: cannot be read", decompress=0
)
compressed(
    "document of control characters",
    in_shards(lambda d: d["tcompress.json"].update(version=2, writer="\x1b[2J\n::error::")),
    r"by \x1b[2J\n:\x3aerror",
    decompress=0,
)
compressed(
    "shards of two models",
    in_shards(lambda d: d[TWO]["source"].update(bytes=1)),
    "is a shard of another checkpoint",
    inspect=4,
    verify=4,
)
compressed(
    "layer in two shards",
    in_shards(lambda d: d[TWO]["layers"].update(d[ONE]["layers"])),
    "tensor fc1.weight: is described in two shards",
    inspect=4,
    verify=4,
)


def document_is_a_fifo(folder: Path) -> Path:
    in_shards(lambda d: d.pop("tcompress.json"))(folder)
    os.mkfifo(folder / "tcompress.json")
    return folder


def document_is_endless(folder: Path) -> Path:
    in_shards(lambda d: d.pop("tcompress.json"))(folder)
    (folder / "tcompress.json").symlink_to("/dev/zero")
    return folder


compressed("document is a FIFO", document_is_a_fifo, "tcompress.json: is not a regular file", decompress=0)
compressed("document is endless", document_is_endless, "tcompress.json: is not a regular file", decompress=0)
