"""A stranger decodes what tcompress writes, from `tcompress/checkpoint/FORMAT.md` and nothing else.

The decoder below knows safetensors, numpy and that page. It imports neither tcompress nor torch; the tests use torch
once, to read the fixtures that are torch checkpoints.
"""

import base64
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, comb, prod
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"

# --------------------------------------------------------------------------------------------------------- the decoder

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1", "I8": "i1"}
WIDTH = {"BF16": 2} | {code: np.dtype(kind).itemsize for code, kind in NUMPY.items()}
CODE = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # PyTorch's word -> safetensors' code


@dataclass(frozen=True)
class Tensor:
    """A tensor as it lies in a file: safetensors' code of its type, its shape, its bytes."""

    code: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def numbers(self):
        """The values; numpy has no bfloat16, whose bits are the upper half of a float32's."""
        if self.code == "BF16":
            flat = (np.frombuffer(self.data, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(self.data, NUMPY[self.code])
        return flat.reshape(self.shape)


def tensor_of(values, code):
    """Cast values to a type, bfloat16 by rounding to the nearest, ties to even."""
    if code == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype(NUMPY[code]).tobytes()
    return Tensor(code, tuple(values.shape), data)


def unfold(tensor, options, shape, axes):
    """The page's unfold; axes names the modes as i1, i2, ..., j1, ..., k."""
    (out, inputs), k = shape[:2], prod(shape[2:])
    sizes = {f"i{n}": mode for n, mode in enumerate(options["out_modes"], 1)}
    sizes |= {f"j{n}": mode for n, mode in enumerate(options["in_modes"], 1)}
    order = [*sizes, "k"] if "k" in axes else [*sizes]
    sizes["k"] = k
    padding = options.get("padding", [0, 0])
    tensor = tensor.reshape([sizes[axis] for axis in axes]).transpose([axes.index(axis) for axis in order])
    return tensor.reshape(out + padding[0], inputs + padding[1], k)[:out, :inputs].reshape(shape)


def axes_of(options, shape):
    """The names of the out modes, of the in modes, and of the kernel where it has one."""
    outs = [f"i{n}" for n in range(1, len(options["out_modes"]) + 1)]
    ins = [f"j{n}" for n in range(1, len(options["in_modes"]) + 1)]
    return outs, ins, ["k"] if len(shape) > 2 else []


def numbered(factors, stem):
    """The factors stem.0, stem.1, ..., all that there are."""
    found = [factors[f"{stem}.{n}"] for n in range(len(factors)) if f"{stem}.{n}" in factors]
    assert len(found) == sum(name.startswith(f"{stem}.") for name in factors)
    return found


def train(cores):
    cores = [core.reshape(core.shape[0], -1, core.shape[-1]) for core in cores]
    whole = cores[0]
    for core in cores[1:]:
        whole = np.tensordot(whole, core, 1)
    assert (whole.shape[0], whole.shape[-1]) == (1, 1)
    return whole


def beginning(factors, stem):
    """The factors whose names begin with the stem, without it."""
    return {name.removeprefix(stem): factor for name, factor in factors.items() if name.startswith(stem)}


def svd(options, shape, factors):
    product = factors["left"] @ factors["right"]
    if options.get("matricisation", "channel") == "channel" or len(shape) == 2:
        return product.reshape(shape)
    kh, kw = shape[2], prod(shape[3:])
    return product.reshape(shape[0], kh, shape[1], kw).swapaxes(1, 2).reshape(shape)


def tt(options, shape, factors):
    outs, ins, kernel = axes_of(options, shape)
    return unfold(train(numbered(factors, "cores")), options, shape, [*outs, *kernel, *ins])


def ttm(options, shape, factors):
    outs, ins, kernel = axes_of(options, shape)
    pairs = [axis for pair in zip(outs, ins, strict=True) for axis in pair]
    return unfold(train(numbered(factors, "cores")), options, shape, [*pairs, *kernel])


def tucker(options, shape, factors):
    whole = factors["core"]
    matrices = numbered(factors, "factors")
    assert whole.ndim == len(matrices) + 1
    for n, matrix in enumerate(matrices):
        whole = np.moveaxis(np.tensordot(matrix, whole, (1, n)), 0, n)
    outs, ins, _ = axes_of(options, shape)
    return unfold(whole, options, shape, [*outs, *ins, "k"])


def cp(options, shape, factors):
    matrices = numbered(factors, "factors")
    whole = factors["weights"]
    for matrix in reversed(matrices):
        whole = (matrix.reshape(len(matrix), *[1] * (whole.ndim - 1), -1)) * whole
    outs, ins, kernel = axes_of(options, shape)
    axes = [axis for pair in zip(outs, ins, strict=True) for axis in pair]
    return unfold(whole.sum(-1), options, shape, [*axes, *kernel])


def reshaped_sum(options, shape, factors):
    total = 0
    for n, name in enumerate(options["reshapes"]):
        own = beginning(factors, f"terms.{n}.")
        if own:
            term = ttm(options, shape, own) if name == "paired" else svd({"matricisation": name}, shape, own)
            total = total + term
    return total


def sparse_product(options, shape, factors):
    del options
    *others, whole = numbered(factors, "factors")
    for factor in reversed(others):
        whole = factor @ whole
    return (factors["scale"] * whole).reshape(shape)


def sparse(options, shape, factors):
    del options
    return factors["matrix"].reshape(shape)


def inner_of(options, option="inner"):
    """The name and the options of the format inside another."""
    name, *settings = options.get(option, "svd").split(":")
    own = dict(setting.split("=") for setting in settings)
    lists = {"out_modes", "in_modes", "padding"}
    return name, {key: [int(n) for n in text.split(",") if n] if key in lists else text for key, text in own.items()}


def shuffled(options, shape, factors):
    name, own = inner_of(options)
    inner = FORMULAS[name](own, shape, beginning(factors, "inner."))
    flat = np.empty(inner.size, inner.dtype)
    flat[np.random.RandomState(options.get("seed", 0)).permutation(flat.size)] = inner.reshape(-1)
    return flat.reshape(shape)


def low_rank_sparse(options, shape, factors):
    kept, own = factors["sparse.matrix"].reshape(shape), beginning(factors, "low_rank.")
    if not own:
        return kept
    name, inner = inner_of(options, "low_rank")
    low = FORMULAS[name](inner, shape, own)
    return np.where(kept == 0, low, kept) if options.get("reconstruction") == "masking" else low + kept


def joint(options, shape, factors):
    if options.get("method", "tucker") == "svd":
        return (factors["left"] @ factors["right"]).reshape(shape)
    names = ("mix", "core", "out_basis", "in_basis")
    return np.einsum("n,npqk,op,iq->oik", *(factors[name] for name in names), optimize=True).reshape(shape)


FORMULAS = {
    "svd": svd,
    "tt": tt,
    "ttm": ttm,
    "tucker": tucker,
    "cp": cp,
    "reshaped-sum": reshaped_sum,
    "sparse-product": sparse_product,
    "sparse": sparse,
    "low-rank-sparse": low_rank_sparse,
    "shuffled": shuffled,
    "joint": joint,
}


class StrangersFile:
    """One safetensors file, read alone."""

    def __init__(self, path):
        self.content = path.read_bytes()
        self.data_start = 8 + int.from_bytes(self.content[:8], "little")
        self.header = json.loads(self.content[8 : self.data_start])
        metadata = self.header.pop("__metadata__", {})
        self.manifest_text = metadata.get("tcompress", "{}")
        self.manifest = json.loads(self.manifest_text)
        self.tensors = {
            name: Tensor(entry["dtype"], tuple(entry["shape"]), self._bytes(*entry["data_offsets"]))
            for name, entry in self.header.items()
        }

    def _bytes(self, start, end):
        return self.content[self.data_start + start : self.data_start + end]

    def factor(self, stem, described):
        """One factor as a tensor of the type that its values have."""
        if described == "dense":
            return self.tensors.pop(stem)
        assert described.keys() - {"values"} == {"encoding", "shape"}
        shape, held = described["shape"], described.get("values")
        places = self.places(stem, described["encoding"], shape)
        if held is None:
            values = self.tensors.pop(f"{stem}.values")
            numbers, code = values.numbers, values.code
        else:
            numbers, code = self.decoded_codes(stem, held, places, shape), "F32"
        flat = np.zeros(prod(shape), numbers.dtype)
        assert numbers.shape == places.shape
        flat[places] = numbers
        return tensor_of(flat.reshape(shape), code)

    def decoded_codes(self, stem, held, places, shape):
        """The values that codes stand for, in the order in which they are stored."""
        codes, scale = self.tensors.pop(f"{stem}.codes"), self.tensors.pop(f"{stem}.scale")
        if held == "int8":
            assert (codes.code, scale.code, scale.shape) == ("I8", "F32", (shape[0],))
            rows = places // prod(shape[1:])
            return codes.numbers.reshape(-1).astype(np.float32) * scale.numbers[rows]
        if held == "int3":
            assert (codes.code, codes.shape) == ("U8", (3, ceil(len(places) / 8)))
            assert (scale.code, scale.shape) == ("F16", (1 + ceil(len(places) / 32),))
            offset, *scales = scale.numbers.astype(np.float32)
            bits = np.unpackbits(codes.numbers, axis=1, bitorder="little")
            assert not bits[:, len(places) :].any()
            sign, low, high = bits[:, : len(places)].astype(np.float32)
            numbers = (low + 2 * high + offset) * (1 - 2 * sign)
            return numbers * np.array(scales)[np.arange(len(places)) // 32]
        assert held == "int4"
        assert (codes.code, codes.shape) == ("U8", (ceil(len(places) / 2),))
        assert (scale.code, scale.shape) == ("F16", (ceil(len(places) / 32),))
        halves = np.stack([codes.numbers & 15, codes.numbers >> 4], axis=1).reshape(-1)
        assert not halves[len(places) :].any()
        numbers = np.where(halves < 8, halves, halves.astype(np.int16) - 16)[: len(places)]
        return numbers.astype(np.float32) * scale.numbers.astype(np.float32)[np.arange(len(places)) // 32]

    def places(self, stem, encoding, shape):
        """The row-major numbers of the elements whose values are stored, in their order."""
        count = prod(shape)
        if encoding == "dense":
            return np.arange(count)
        if encoding == "bitmask":
            bits = np.unpackbits(self.tensors.pop(f"{stem}.mask").numbers, bitorder="little")
            assert not bits[count:].any()
            return np.flatnonzero(bits)
        if encoding.startswith("elias-fano:"):
            low, written = int(encoding[11:]), self.tensors.pop(f"{stem}.positions")
            assert written.code == "U8"
            for k in range(count + 1):  # the one that the length and the high bits tell
                rest = 0 if k == 0 else ceil((k + ((count - 1) >> low)) / 8)
                rows, high = np.split(written.numbers, [len(written.numbers) - rest]) if rest else (written.numbers, [])
                ones = np.flatnonzero(np.unpackbits(np.array(high, np.uint8), bitorder="little"))
                if len(rows) == low * ceil(k / 8) and len(ones) == k:
                    break
            bits = np.unpackbits(rows.reshape(low, -1) if low else rows[None], axis=1, bitorder="little")
            assert not bits[:, k:].any()
            lower = [bits[at, :k].astype(int) * 2**at for at in range(low)]
            return (ones - np.arange(k)) * 2**low + sum(lower, np.zeros(k, int))
        if encoding == "delta8":
            found, position = [], 0
            for gap in self.tensors.pop(f"{stem}.gaps").numbers.tolist():
                position += gap
                if gap < 255:
                    found.append(position)
                    position += 1
            return np.array(found, int)
        if ":" in encoding:
            n, m = map(int, encoding.split(":"))
            patterns = list(itertools.combinations(range(m), n))
            bits = np.unpackbits(self.tensors.pop(f"{stem}.patterns").numbers, bitorder="little")
            groups, width = count // m, ceil(np.log2(len(patterns)))
            assert not bits[groups * width :].any()
            numbers = bits[: groups * width].reshape(groups, width) @ (1 << np.arange(width))
            return (np.array(patterns)[numbers] + m * np.arange(groups)[:, None]).reshape(-1)
        assert encoding == "csr"
        (m, n), columns = shape, self.tensors.pop(f"{stem}.columns")
        assert columns.code == ("U16" if n <= 65536 else "I32")
        starts = self.tensors.pop(f"{stem}.row_starts").numbers
        assert starts.shape == (m + 1,)
        assert starts[0] == 0
        assert starts[-1] == len(columns.numbers)
        rows = np.repeat(np.arange(m), np.diff(starts))
        places = rows * n + columns.numbers.astype(int)
        assert (np.diff(places) > 0).all()
        return places

    def decode(self):
        """Every dense tensor that this file stands for, tied names included."""
        manifest, dense = self.manifest, {}
        shared = {
            group: {name: self.factor(f"shared.{group}.{name}", described) for name, described in factors.items()}
            for group, factors in manifest.get("shared", {}).items()
        }
        for name, entry in manifest["layers"].items():
            code = CODE[entry["dtype"]]
            working = np.float64 if code == "F64" else np.float32
            factors = {
                factor: self.factor(f"{name}.{factor}", described).numbers.astype(working)
                for factor, described in entry["factors"].items()
            }
            if "group" in entry:
                common = shared[entry["group"]].items()
                factors |= {factor: tensor.numbers.astype(working) for factor, tensor in common}
            shape = tuple(entry["shape"])
            dense[name] = tensor_of(FORMULAS[entry["format"]](entry["options"], shape, factors), code)
            assert dense[name].shape == shape
        assert not dense.keys() & self.tensors.keys()
        dense |= self.tensors
        ties = manifest["tied"].items()  # a shard names the ties of the whole model
        return dense | {second: dense[first] for second, first in ties if first in dense}


# ----------------------------------------------------------------------------------------------------------- the cases


@dataclass(frozen=True)
class Case:
    """A fixture, how to compress it, and the encodings that must occur so that the test tests them."""

    name: str
    fixture: str
    options: str
    encodings: frozenset[str]

    @property
    def format(self):
        name = self.options.split()[1].split(":")[0]
        return {"lrs": "low-rank-sparse"}.get(name, name)

    @property
    def exact(self):
        """A sum of products depends on their order; nothing else in the page rounds."""
        return self.format == "sparse"

    def named(self, shape):
        """The options that an entry has: those given, and how the weight was folded."""
        given = {setting.split("=")[0] for setting in self.options.split()[1].split(":")[1:]} - {
            "order",
            "inner.order",
            "low_rank.matricisation",
        }
        given |= {"rank"} if self.format == "svd" else {"density"} if self.format == "sparse" else set()
        if self.format in {"tt", "ttm", "tucker", "cp"}:
            given |= {"out_modes", "in_modes"}
        if self.format == "low-rank-sparse":
            given |= {"low_rank"} if self.name == "lrs-tt" else set()
        if self.format == "reshaped-sum":
            given |= {"reshapes"} | ({"out_modes", "in_modes"} if prod(shape[2:]) == 1 else set())
        return given


def case(name, fixture, options, *encodings):
    return pytest.param(Case(name, fixture, options, frozenset(encodings)), id=name)


CASES = [
    case("cnn-svd", "digits_cnn.safetensors", "--format svd --keep 0.3 --dtype bf16", "dense"),
    case("mlp-all-values", "digits_mlp.safetensors", "--format sparse:density=1 --dtype bf16", "dense"),
    case("bf16-svd", "digits_mlp_bf16.safetensors", "--format svd --rank 8", "dense"),
    case("bf16-sparse", "digits_mlp_bf16.safetensors", "--format sparse:density=0.02", "delta8", "elias-fano"),
    case("tied-svd", "digits_mlp_tied.pt", "--format svd --rank 8", "dense"),
    case("nested-sparse", "digits_cnn.pt", "--format sparse:density=0.02 --dtype bf16", "delta8", "elias-fano"),
    case("shards-svd", "digits_mlp_sharded", "--format svd --rank 8 --max-shard-size 9KB", "dense"),
    case("tied-shards-sparse", "tied_folder", "--format sparse --keep 0.3 --max-shard-size 8KB", "bitmask"),
    case("odd-sparse", "odd.safetensors", "--format sparse:density=0.01", "delta8", "elias-fano"),
    case("spatial", "layers.safetensors", "--format svd:rank=3:matricisation=spatial", "dense"),
    case("tt", "layers.safetensors", "--format tt:rank=3 --dtype bf16", "dense"),
    case("odd-tt", "odd.safetensors", "--format tt:rank=2:order=3", "dense"),
    case("ttm", "layers.safetensors", "--format ttm:rank=3", "dense"),
    case("cnn-tucker", "digits_cnn.safetensors", "--format tucker:rank=3 --dtype bf16", "dense"),
    case("folded-tucker", "layers.safetensors", "--format tucker:rank=3:order=2", "dense"),
    case("cp", "layers.safetensors", "--format cp:rank=4", "dense"),
    case("folded-cp", "layers.safetensors", "--format cp:rank=3:order=2 --dtype bf16", "dense"),
    case("reshaped-sum", "layers.safetensors", "--format reshaped-sum:rank=2", "dense"),
    case("missing-term", "layers.safetensors", "--format reshaped-sum:ranks=0,3 --dtype bf16", "dense"),
    case(
        "sparse-product",
        "large.safetensors",
        "--format sparse-product:nonzeros=2:count=3",
        "dense",
        "delta8",
        "elias-fano",
    ),
    case("thin-sparse", "thin.safetensors", "--format sparse:density=0.0005", "elias-fano"),
    case("2:4", "patterned.safetensors", "--format sparse:density=0.5 --dtype bf16", "2:4"),
    case("2:4-int8", "patterned.safetensors", "--format sparse:density=0.5 --dtype int8", "2:4 int8"),
    case("2:4-int4", "patterned.safetensors", "--format sparse:density=0.5 --dtype int4", "2:4 int4"),
    case("2:4-int3", "patterned.safetensors", "--format sparse:density=0.5 --dtype int3", "2:4 int3"),
    case("svd-int3", "layers.safetensors", "--format svd:rank=3 --dtype int3", "dense int3"),
    case("sparse-int3", "large.safetensors", "--format sparse:density=0.4 --dtype int3", "bitmask int3"),
    case("thin-int3", "large.safetensors", "--format sparse:density=0.1 --dtype int3", "elias-fano int3"),
    case("svd-int8", "layers.safetensors", "--format svd:rank=3 --dtype int8", "dense int8"),
    case("svd-int4", "layers.safetensors", "--format svd:rank=3 --dtype int4", "dense int4"),
    case("tucker-int4", "layers.safetensors", "--format tucker:rank=3:order=2 --dtype int4", "dense int4"),
    case("cp-int8", "layers.safetensors", "--format cp:rank=4 --dtype int8", "dense", "dense int8"),
    case("sparse-int8", "large.safetensors", "--format sparse:density=0.3 --dtype int8", "bitmask int8"),
    case("sparse-int4", "odd.safetensors", "--format sparse:density=0.05 --dtype int4", "elias-fano int4"),
    case("joint-int4", "groups_folder", "--format joint:ranks=4,3,3 --include fc* --dtype int4", "dense"),
    case("lrs", "large.safetensors", "--format low-rank-sparse:rank=3:density=0.2", "dense", "elias-fano"),
    case(
        "lrs-tt",
        "layers.safetensors",
        "--format low-rank-sparse:low_rank=tt:rank=2:rounds=5 --dtype bf16",
        "dense",
        "elias-fano",
    ),
    case(
        "lrs-masking",
        "layers.safetensors",
        "--format lrs:rank=3:density=0.3:low_rank=svd:low_rank.matricisation=spatial:reconstruction=masking",
        "dense",
        "bitmask",
    ),
    case(
        "lrs-int4",
        "large.safetensors",
        "--format low-rank-sparse:rank=9:density=0.05 --dtype int4",
        "dense int4",
        "elias-fano int4",
    ),
    case("lrs-sparse", "large.safetensors", "--format low-rank-sparse:rank=0:density=0.3", "bitmask"),
    case("shuffled", "layers.safetensors", "--format shuffled:inner=tt:inner.order=2:rank=3:seed=7", "dense"),
    case("shuffled-ttm", "layers.safetensors", "--format shuffled:inner=ttm:rank=3 --dtype bf16", "dense"),
    case("joint-shards", "groups_folder", "--format joint:ranks=4,3,3 --max-shard-size 2KB", "dense"),
    case("joint-svd", "groups_folder", "--format joint:rank=4:method=svd --include fc* --dtype bf16", "dense"),
]
FOLDERS = [param for param in CASES if "shards" in param.id]


def make_sources(folder):
    """What the fixtures lack: ties in a folder; wide rows, other types, negative zeros, empty tensors."""
    (folder / "tied_folder").mkdir()
    (folder / "tied_folder" / "config.json").write_text("{}")
    shutil.copy(FIXTURES / "digits_mlp_tied.pt", folder / "tied_folder" / "pytorch_model.bin")
    random = np.random.default_rng(0)
    zeros = np.full((64, 64), -0.0, np.float32)
    zeros[::8, 5] = 1.5
    tensors = {
        "wide.weight": random.standard_normal((2, 70000)).astype(np.float32),
        "double.weight": random.standard_normal((64, 64)),
        "half.weight": random.standard_normal((100, 50)).astype(np.float16),
        "conv.weight": random.standard_normal((16, 8, 9)).astype(np.float32),
        "zeros.weight": zeros,
        "m.empty": np.zeros((0, 4), np.float32),
        "a.empty": np.zeros(0, np.float32),
        "z.empty": np.zeros((3, 0), np.int64),
        "odd.bytes": np.arange(5, dtype=np.uint8),
    }
    save_file(tensors, folder / "odd.safetensors", {"format": "pt"})
    # Sizes with two prime factors each, primes that are padded, and kernels of one, two and three sizes.
    shapes = [(24, 40), (37, 41), (13, 17, 3, 3), (24, 20, 5), (40, 28, 1, 1), (8, 15, 2, 3, 3)]
    save_file(
        {f"layer{n}.weight": numbers(random, *shape) for n, shape in enumerate(shapes)}, folder / "layers.safetensors"
    )
    large = {"fc.weight": numbers(random, 200, 150), "conv.weight": numbers(random, 30, 20, 3, 2)}
    save_file(large, folder / "large.safetensors")
    make_groups(random, folder / "groups_folder")
    # Rows so long that their starts cost less than the zeros; and two values in every four neighbours.
    thin = {"long.weight": numbers(random, 2, 60000), "longer.weight": numbers(random, 2, 70000)}
    save_file(thin, folder / "thin.safetensors")
    fours = numbers(random, 64, 24, 4)
    np.put_along_axis(fours, np.argsort(np.abs(fours))[:, :, :2], 0, axis=2)
    save_file({"fc.weight": fours.reshape(64, 96)}, folder / "patterned.safetensors")


def numbers(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def make_groups(random, folder):
    """Weights of which each four have the same bases on either side, and a little noise: better stored jointly."""
    tensors = {"last.weight": numbers(random, 10, 24), "last.bias": numbers(random, 10)}
    for kind, shape in (("fc", (24, 20)), ("conv", (16, 12, 3, 3))):
        out, inputs = numbers(random, shape[0], 3), numbers(random, shape[1], 3)
        for layer in range(4):
            weight = np.einsum("op,pq...,iq->oi...", out, numbers(random, 3, 3, *shape[2:]), inputs)
            tensors[f"{kind}{layer}.weight"] = (weight + 0.1 * numbers(random, *shape)).astype(np.float32)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")


@dataclass(frozen=True)
class Run:
    """What the command line made of a case."""

    case: Case
    source: Path
    compressed: Path
    dense: Path

    @property
    def files(self):
        return [StrangersFile(path) for path in weight_files(self.compressed)]

    def layers(self):
        """Every compressed layer: its entry, the weight, the decoded weight."""
        original, decoded = originals(self.source), {}
        entries = {}
        for file in self.files:
            decoded |= file.decode()
            entries |= file.manifest["layers"]
        assert entries, "the case compresses something"
        return [(entry, original[name], decoded[name]) for name, entry in entries.items()]


def weight_files(path):
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def stored_dense(path):
    """The tensors of plain safetensors files."""
    return {name: tensor for file in weight_files(path) for name, tensor in StrangersFile(file).tensors.items()}


def originals(path):
    path = next(path.glob("*.bin"), path) if path.is_dir() else path
    if path.suffix not in {".pt", ".bin"}:
        return stored_dense(path)
    state = torch.load(path, weights_only=True)
    state = state.get("state_dict", state)
    codes = {torch.float32: "F32", torch.int64: "I64"}
    return {name: Tensor(codes[t.dtype], tuple(t.shape), t.numpy().tobytes()) for name, t in state.items()}


# The command line, many times in one process: starting one takes two seconds.
COMMANDS = """
import json, sys
from tcompress.cli.app import run
for arguments in json.load(sys.stdin):
    print(*arguments, file=sys.stderr)
    run(arguments)
"""


def run_all(runs):
    """Compress and decompress; what went wrong is returned, and shows in the outputs that are missing."""
    usual = ["--device", "cpu", "--threads", "1"]
    commands = []
    for run in runs:
        compress = ["compress", str(run.source), *run.case.options.split(), "-o", str(run.compressed)]
        commands += [[*compress, *usual], ["decompress", str(run.compressed), "-o", str(run.dense), *usual]]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps(commands),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr


def planned(case, folder):
    source = next(path for path in (FIXTURES / case.fixture, folder / case.fixture) if path.exists())
    suffix = "" if source.is_dir() else ".safetensors"
    return Run(case, source, folder / f"{case.name}{suffix}", folder / f"{case.name}-dense{suffix}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, tuple[Run, Future[str]]]]:
    """Each case once, dealt out to a few processes."""
    folder = tmp_path_factory.mktemp("stranger")
    make_sources(folder)
    cases = {param.id: planned(param.values[0], folder) for param in CASES}
    count = min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        parts = [pool.submit(run_all, list(cases.values())[part::count]) for part in range(count)]
        yield {name: (run, parts[place % count]) for place, (name, run) in enumerate(cases.items())}


@pytest.fixture
def run(runs, request) -> Run:
    found, process = runs[request.param.name]
    errors = process.result()
    assert found.dense.exists(), errors
    return found


every_case = pytest.mark.parametrize("run", CASES, indirect=True)
every_folder = pytest.mark.parametrize("run", FOLDERS, indirect=True)


def assert_rounded_up(stated, exact, slack):
    """Seven significant digits, never below the truth (but for float64's own rounding), above it by 1e-6 at most."""
    assert stated == float(f"{stated:.7g}")
    assert exact * (1 - slack - 1e-13) <= stated <= exact * (1 + slack + 1e-6)


# ----------------------------------------------------------------------------------------------------------- the tests


def name_of(described):
    """The encoding, without the number that the page writes as l, and the codes that stand for its values."""
    if described == "dense":
        return described
    encoding = re.sub("^(elias-fano):.*", r"\1", described["encoding"])
    return " ".join([encoding, described.get("values", "")]).strip()


@every_case
def test_each_file_alone_gives_back_its_tensors(run):
    original, dense = originals(run.source), stored_dense(run.dense)
    seen, encodings = set(), set()
    for file in run.files:
        layers, stored = file.manifest["layers"], set(file.tensors)
        for name, tensor in file.decode().items():
            assert name not in seen
            seen.add(name)
            assert (tensor.code, tensor.shape) == (original[name].code, original[name].shape)
            assert (tensor.code, tensor.shape) == (dense[name].code, dense[name].shape)
            first = file.manifest["tied"].get(name, name)
            if first not in layers:
                assert first in stored
                assert tensor.data == original[name].data == dense[name].data
            elif run.case.exact:
                assert tensor.data == dense[name].data
            else:
                # A float32 sum differs in its last few bits.
                one_step = {"BF16": 2.0**-8, "F16": 2.0**-10}.get(tensor.code, 2.0**-20)
                gap = np.abs(tensor.numbers - dense[name].numbers).max()
                assert gap <= 2 * one_step * np.abs(dense[name].numbers).max(), name
        for entry in layers.values():
            encodings |= {name_of(described) for described in entry["factors"].values()}
    assert seen == original.keys() == dense.keys()
    assert encodings == run.case.encodings


@pytest.mark.parametrize("encoding", ["csr", "elias-fano", "int3"])
def test_files_of_before_are_read_by_the_page_as_well(encoding, tmp_path):
    old = FIXTURES / "compressed" / "v1" / f"sparse-{encoding}.safetensors"
    file, plain = StrangersFile(old), tmp_path / "plain.safetensors"
    command = [sys.executable, "-m", "tcompress", "decompress", str(old), "-o", str(plain), "--device", "cpu"]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    dense = stored_dense(plain)
    assert {name: tensor.data for name, tensor in file.decode().items()} == {n: t.data for n, t in dense.items()}


@every_case
def test_the_reported_norm_and_error_are_those_of_the_stored_bytes(run):
    for entry, original, decoded in run.layers():
        weight, rebuilt = original.numbers.astype(np.float64), decoded.numbers.astype(np.float64)
        norm = np.linalg.norm(weight)
        error = np.linalg.norm(weight - rebuilt) / norm
        assert_rounded_up(entry["norm"], norm, slack=0)
        assert_rounded_up(entry["relative_error"], error, slack=0 if run.case.exact else 2e-7)


ENTRY = {"dtype", "factors", "format", "kind", "norm", "options", "relative_error", "shape"}


@every_case
def test_entries_say_what_the_layer_was(run):
    for entry, original, _ in run.layers():
        assert entry.keys() - {"group"} == ENTRY
        assert ("group" in entry) == (entry["format"] == "joint")
        assert (CODE[entry["dtype"]], tuple(entry["shape"])) == (original.code, original.shape)
        assert entry["kind"] == ("conv" if len(original.shape) > 2 else "linear")
        assert entry["format"] == run.case.format
        assert entry["options"].keys() - {"padding"} == run.case.named(entry["shape"])


def shapes_of(name, options, shape, found):
    """The shapes that the page's table gives the factors; their ranks are read off those that are there."""
    out, inputs, k, fan_in = shape[0], shape[1], prod(shape[2:]), prod(shape[1:])
    modes = [*options.get("out_modes", []), *options.get("in_modes", [])]
    half, kernel = len(modes) // 2, [k] if len(shape) > 2 else []
    if name == "svd":
        is_spatial = options.get("matricisation") == "spatial" and len(shape) > 2
        rows = out * shape[2] if is_spatial else out
        (r, _) = found["right"]
        return {"left": (rows, r), "right": (r, prod(shape) // rows)}
    if name in {"tt", "ttm"}:
        middles = [(mode,) for mode in [*modes[:half], *kernel, *modes[half:]]]
        if name == "ttm":
            middles = [*zip(modes[:half], modes[half:], strict=True), *((k, 1) for k in kernel)]
        ranks = [1, *(found[f"cores.{n}"][-1] for n in range(len(middles) - 1)), 1]
        return {f"cores.{n}": (ranks[n], *middle, ranks[n + 1]) for n, middle in enumerate(middles)}
    if name == "tucker":
        factors = {f"factors.{n}": (mode, found["core"][n]) for n, mode in enumerate(modes)}
        return {"core": (*found["core"][:-1], k), **factors}
    if name == "cp":
        (rank,) = found["weights"]
        rows = [i * j for i, j in zip(modes[:half], modes[half:], strict=True)] if half > 1 else modes
        return {"weights": (rank,), **{f"factors.{n}": (row, rank) for n, row in enumerate([*rows, *kernel])}}
    if name == "reshaped-sum":
        expected = {}
        for n, reshape in enumerate(options["reshapes"]):
            own, kind = beginning(found, f"terms.{n}."), "ttm" if reshape == "paired" else "svd"
            told = options if reshape == "paired" else {"matricisation": reshape}
            term = shapes_of(kind, told, shape, own) if own else {}
            expected |= {f"terms.{n}.{factor}": size for factor, size in term.items()}
        return expected
    if name == "sparse-product":
        inner, count = min(out, fan_in), len(found) - 1
        sizes = [out, *[inner] * (count - 1), fan_in]
        return {"scale": (1,), **{f"factors.{n}": pair for n, pair in enumerate(itertools.pairwise(sizes))}}
    if name == "sparse":
        return {"matrix": (out, fan_in)}
    if name == "low-rank-sparse":
        kind, own = inner_of(options, "low_rank")
        low = beginning(found, "low_rank.")
        inner = shapes_of(kind, own, shape, low) if low else {}
        return {"sparse.matrix": (out, fan_in)} | {f"low_rank.{factor}": size for factor, size in inner.items()}
    if name == "shuffled":
        kind, own = inner_of(options)
        inner = shapes_of(kind, own, shape, beginning(found, "inner."))
        return {f"inner.{factor}": size for factor, size in inner.items()}
    if options.get("method") == "svd":
        return {"left": (out, found["right"][0]), "right": (found["right"][0], fan_in)}
    n, p, q, _ = found["core"]
    return {"mix": (n,), "core": (n, p, q, k), "out_basis": (out, p), "in_basis": (inputs, q)}


@every_case
def test_factors_have_the_shapes_of_the_page_and_sparse_ones_the_smallest_encoding(run):
    for file in run.files:
        for name, entry in file.manifest["layers"].items():
            asked = run.case.options.partition("--dtype ")[2].split(" ")[0]
            stored_as = {"bf16": "BF16", "int8": "F32", "int4": "F32", "int3": "F32"}.get(asked, CODE[entry["dtype"]])
            described = {factor: (f"{name}.{factor}", how) for factor, how in entry["factors"].items()}
            if "group" in entry:
                shared = file.manifest["shared"][entry["group"]].items()
                described |= {factor: (f"shared.{entry['group']}.{factor}", how) for factor, how in shared}
            stored = dict(file.tensors)
            found = {factor: file.factor(stem, how) for factor, (stem, how) in described.items()}
            file.tensors |= stored  # the decoder takes what it has read
            sizes = {factor: tensor.shape for factor, tensor in found.items()}
            assert sizes == shapes_of(entry["format"], entry["options"], tuple(entry["shape"]), sizes)
            assert {tensor.code for tensor in found.values()} == {stored_as}
            for factor, (stem, how) in described.items():
                # Codes of small values are zero: which values were none at all is not to be seen any more.
                if (
                    factor.startswith(("matrix", "sparse.", "factors"))
                    and "sparse" in entry["format"]
                    and "int" not in asked
                ):
                    parts = {key: t for key, t in stored.items() if key == stem or key.startswith(f"{stem}.")}
                    assert_smallest(found[factor], how, parts)
            if entry["format"] == "sparse" and "int" not in asked:
                kept = nonzeros(found["matrix"])
                assert abs(kept - entry["options"]["density"] * prod(entry["shape"])) <= 1


def assert_smallest(factor, described, parts):
    (m, n), k, s = factor.shape, nonzeros(factor), WIDTH[factor.code]
    costs = {
        "dense": m * n * s,
        "bitmask": k * s + ceil(m * n / 8),
        "elias-fano": k * s + min(low * ceil(k / 8) + ceil((k + ((m * n - 1) >> low)) / 8) for low in range(40)),
        "delta8": k * (s + 1) + sum(gap // 255 for gap in gaps(factor)),
        "csr": k * (s + (2 if n <= 65536 else 4)) + 8 * (m + 1),
    }
    there = np.frombuffer(factor.data, f"<u{s}") != 0
    for width in (4, 8, 16):
        most = there.reshape(-1, width).sum(axis=1).max() if n % width == 0 else 0
        if 0 < most < width and m * n >= 1024:
            bits = ceil(np.log2(comb(width, most)))
            costs[f"{most}:{width}"] = m * n // width * most * s + ceil(m * n // width * bits / 8)
    encoding = described if described == "dense" else described["encoding"]
    kind = encoding.split(":")[0] if encoding.startswith("elias-fano") else encoding
    assert kind == min(costs, key=costs.__getitem__)
    assert sum(len(part.data) for part in parts.values()) == costs[kind]


def gaps(tensor):
    """How many zeros stand before each value whose bits are not all zero."""
    return np.diff(np.flatnonzero(np.frombuffer(tensor.data, f"<u{WIDTH[tensor.code]}")), prepend=-1) - 1


def nonzeros(tensor):
    """How many values have bits that are not all zero."""
    return np.count_nonzero(np.frombuffer(tensor.data, f"<u{WIDTH[tensor.code]}"))


@every_case
def test_the_hashes_are_those_of_the_bytes(run):
    for file in run.files:
        hashes = file.manifest["hashes"]
        assert hashes.keys() == {"header", "tensors"}
        in_order = sorted(file.tensors, key=lambda name: file.header[name]["data_offsets"])
        assert in_order == list(file.header), "the header is in the order of the data"
        digests = b"".join(xxhash.xxh3_128(file.tensors[name].data).digest() for name in in_order)
        assert base64.b64decode(hashes["tensors"], validate=True) == digests
        first_bytes = file.content[: file.data_start]
        digest = hashes["header"].encode()
        assert first_bytes.count(digest) == 1
        assert xxhash.xxh3_128(first_bytes.replace(digest, b"0" * 32)).hexdigest() == hashes["header"]


@every_case
def test_the_source_is_the_checkpoint_it_was_made_from(run):
    source = run.source
    files = list(source.glob("*.bin")) or weight_files(source)
    sha256 = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    if len(files) > 1:
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sha256.items()))
        sizes = [path.stat().st_size for path in files]
        index = source / "model.safetensors.index.json"
        expected = {
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "bytes": sum(sizes) + index.stat().st_size,
            "shard_bytes": max(sizes),
        }
    else:
        expected = {"sha256": sha256[files[0].name], "bytes": files[0].stat().st_size}
    if run.case.name == "nested-sparse":
        expected["key"] = "state_dict"
    for file in run.files:
        assert file.manifest["source"] == expected


@every_case
def test_ties_are_named_and_stored_once(run):
    ties = {f"hidden2.{end}": f"hidden1.{end}" for end in ("weight", "bias")} if "tied" in run.case.name else {}
    assert {second: first for file in run.files for second, first in file.manifest["tied"].items()} == ties
    for file in run.files:
        assert not any(stored.startswith("hidden2.") for stored in file.tensors)
        own = file.tensors.keys() | file.manifest["layers"].keys()
        assert own.issuperset(file.manifest["tied"].values())


@every_case
def test_the_manifest_is_sorted_json_without_white_space(run):
    for file in run.files:
        manifest = file.manifest
        assert file.manifest_text == json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        known = {"version", "writer", "source", "tied", "rebuild", "layers", "hashes"}
        groups = {entry["group"] for entry in manifest["layers"].values() if "group" in entry}
        assert manifest.keys() == known | ({"shared"} if groups else set())
        assert manifest.get("shared", {}).keys() == groups
        assert manifest["version"] == 1
        assert manifest["writer"].startswith("tcompress ")
        assert {entry["format"] for entry in manifest["layers"].values()} == manifest["rebuild"].keys()


@every_case
def test_every_tensor_is_aligned_and_the_wider_ones_come_first(run):
    for file in run.files:
        placed = [(*file.header[name]["data_offsets"], WIDTH[tensor.code]) for name, tensor in file.tensors.items()]
        assert [width for *_, width in placed] == sorted((width for *_, width in placed), reverse=True)
        assert all((file.data_start + start) % width == 0 for start, _, width in placed)
        assert [start for start, *_ in placed] == [0, *(end for _, end, _ in placed[:-1])]
        assert placed[-1][1] == len(file.content) - file.data_start


@every_case
def test_a_safetensors_reader_sees_the_same(run):
    for path in weight_files(run.compressed):
        file = StrangersFile(path)
        with safe_open(path, framework="numpy") as reader:
            assert reader.metadata()["tcompress"] == file.manifest_text
            assert set(reader.keys()) == file.tensors.keys()
            for name, tensor in file.tensors.items():
                assert tuple(reader.get_slice(name).get_shape()) == tensor.shape
                if tensor.code != "BF16":
                    assert reader.get_tensor(name).tobytes() == tensor.data


@every_folder
def test_a_folder_has_shards_an_index_and_the_whole_manifest(run):
    folder, files = run.compressed, {path.name: StrangersFile(path) for path in weight_files(run.compressed)}
    count = len(files)
    assert count > 1
    assert list(files) == [f"model.tcompress-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    others = {"config.json", "model.tcompress.safetensors.index.json", "tcompress.json"}
    assert {path.name for path in folder.iterdir()} == files.keys() | others
    config = json.loads((folder / "config.json").read_bytes())
    config.pop("quantization_config", None)  # how transformers finds the weights
    assert config == json.loads((run.source / "config.json").read_bytes())
    index = json.loads((folder / "model.tcompress.safetensors.index.json").read_text())
    assert index["weight_map"] == {stored: name for name, file in files.items() for stored in file.tensors}
    assert index["metadata"]["total_size"] == sum(len(t.data) for f in files.values() for t in f.tensors.values())

    text = (folder / "tcompress.json").read_text()
    whole = json.loads(text)
    assert text.rstrip() == json.dumps(whole, sort_keys=True, separators=(",", ":"))
    layers, rebuild, tied, shared = {}, {}, {}, {}
    for file in files.values():
        assert not layers.keys() & file.manifest["layers"].keys()
        layers |= file.manifest["layers"]
        rebuild |= file.manifest["rebuild"]
        tied |= file.manifest["tied"]
        own = file.manifest.get("shared", {})
        assert not shared.keys() & own.keys()
        shared |= own
        rest = file.manifest.keys() - {"layers", "rebuild", "tied", "shared", "hashes"}
        assert all(file.manifest[key] == whole[key] for key in rest)
    assert whole.keys() - {"shared"} == {"version", "writer", "source", "tied", "rebuild", "layers"}
    assert (whole["layers"], whole["rebuild"], whole["tied"]) == (layers, rebuild, tied)
    assert whole.get("shared", {}) == shared
    if run.case.format == "joint":
        assert sum("shared" in file.manifest for file in files.values()) == len(shared) == 2, "a shard for each group"


@every_case
def test_formulas_and_formats_are_those_of_the_page(run):
    page = (ROOT / "tcompress" / "checkpoint" / "FORMAT.md").read_text()
    for file in run.files:
        for name, formula in file.manifest["rebuild"].items():
            (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
            assert f" | `{formula}` | " in row
