"""A stranger decodes what tcompress writes, from `tcompress/checkpoint/FORMAT.md` and nothing else.

The decoder below knows safetensors, numpy and that page. It imports neither tcompress nor torch; the tests use torch
once, to read the fixtures that are torch checkpoints.
"""

import base64
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, prod
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

NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U16": "<u2", "U8": "u1"}
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
        """One factor as a matrix, and the type that it is stored in."""
        if described == "dense":
            return self.tensors.pop(stem)
        m, n = described["shape"]
        values = self.tensors.pop(f"{stem}.values")
        matrix = np.zeros((m, n), values.numbers.dtype)
        if described["encoding"] == "bitmask":
            bits = np.unpackbits(self.tensors.pop(f"{stem}.mask").numbers, bitorder="little")
            assert not bits[m * n :].any()
            matrix[bits[: m * n].astype(bool).reshape(m, n)] = values.numbers
        else:
            assert described["encoding"] == "csr"
            columns = self.tensors.pop(f"{stem}.columns")
            assert columns.code == ("U16" if n <= 65536 else "I32")
            starts = self.tensors.pop(f"{stem}.row_starts").numbers
            assert starts.shape == (m + 1,)
            assert starts[0] == 0
            assert starts[-1] == len(values.numbers) == len(columns.numbers)
            for row, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
                where = columns.numbers[start:end].astype(int)
                assert (np.diff(where) > 0).all()
                matrix[row, where] = values.numbers[start:end]
        return tensor_of(matrix, values.code)

    def decode(self):
        """Every dense tensor that this file stands for, tied names included."""
        manifest, dense = self.manifest, {}
        for name, entry in manifest["layers"].items():
            code = CODE[entry["dtype"]]
            working = np.float64 if code == "F64" else np.float32
            factors = {
                factor: self.factor(f"{name}.{factor}", described).numbers.astype(working)
                for factor, described in entry["factors"].items()
            }
            formula = manifest["rebuild"][entry["format"]]
            if formula == "(left @ right).reshape(shape)":
                weight = factors["left"] @ factors["right"]
            else:
                assert formula == "matrix.reshape(shape)"
                weight = factors["matrix"]
            dense[name] = tensor_of(weight.reshape(entry["shape"]), code)
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
    def exact(self):
        """A matrix product depends on the order of its sums; nothing else in the page rounds."""
        return "svd" not in self.options


def case(name, fixture, options, *encodings):
    return pytest.param(Case(name, fixture, options, frozenset(encodings)), id=name)


CASES = [
    case("cnn-svd", "digits_cnn.safetensors", "--format svd --keep 0.3 --dtype bf16", "dense"),
    case("mlp-all-values", "digits_mlp.safetensors", "--format sparse:density=1 --dtype bf16", "dense"),
    case("bf16-svd", "digits_mlp_bf16.safetensors", "--format svd --rank 8", "dense"),
    case("bf16-sparse", "digits_mlp_bf16.safetensors", "--format sparse:density=0.02", "bitmask", "csr"),
    case("tied-svd", "digits_mlp_tied.pt", "--format svd --rank 8", "dense"),
    case("nested-sparse", "digits_cnn.pt", "--format sparse:density=0.02 --dtype bf16", "bitmask", "csr"),
    case("shards-svd", "digits_mlp_sharded", "--format svd --rank 8 --max-shard-size 9KB", "dense"),
    case("tied-shards-sparse", "tied_folder", "--format sparse --keep 0.3 --max-shard-size 8KB", "bitmask"),
    case("odd-sparse", "odd.safetensors", "--format sparse:density=0.01", "bitmask", "csr"),
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


def tcompress(*arguments):
    """The command line, as a user has it."""
    done = subprocess.run(
        [sys.executable, "-m", "tcompress", *map(str, arguments), "--device", "cpu", "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"


def compress_and_decompress(case, folder):
    source = next(path for path in (FIXTURES / case.fixture, folder / case.fixture) if path.exists())
    suffix = "" if source.is_dir() else ".safetensors"
    compressed, dense = folder / f"{case.name}{suffix}", folder / f"{case.name}-dense{suffix}"
    tcompress("compress", source, *case.options.split(), "-o", compressed)
    tcompress("decompress", compressed, "-o", dense)
    return Run(case, source, compressed, dense)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Future[Run]]]:
    """Each case once, all at the same time: a process takes two seconds to start."""
    folder = tmp_path_factory.mktemp("stranger")
    make_sources(folder)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {param.id: pool.submit(compress_and_decompress, param.values[0], folder) for param in CASES}


@pytest.fixture
def run(runs, request) -> Run:
    return runs[request.param.name].result()


every_case = pytest.mark.parametrize("run", CASES, indirect=True)
every_folder = pytest.mark.parametrize("run", FOLDERS, indirect=True)


def assert_rounded_up(stated, exact, slack):
    """Seven significant digits, never below the truth (but for float64's own rounding), above it by 1e-6 at most."""
    assert stated == float(f"{stated:.7g}")
    assert exact * (1 - slack - 1e-13) <= stated <= exact * (1 + slack + 1e-6)


# ----------------------------------------------------------------------------------------------------------- the tests


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
                one_step = 2.0**-8 if tensor.code == "BF16" else 2.0**-20  # a float32 sum differs in its last few bits
                gap = np.abs(tensor.numbers - dense[name].numbers).max()
                assert gap <= 2 * one_step * np.abs(dense[name].numbers).max()
        for entry in layers.values():
            encodings |= {d if d == "dense" else d["encoding"] for d in entry["factors"].values()}
    assert seen == original.keys() == dense.keys()
    assert encodings == run.case.encodings


@every_case
def test_the_reported_norm_and_error_are_those_of_the_stored_bytes(run):
    for entry, original, decoded in run.layers():
        weight, rebuilt = original.numbers.astype(np.float64), decoded.numbers.astype(np.float64)
        norm = np.linalg.norm(weight)
        error = np.linalg.norm(weight - rebuilt) / norm
        assert_rounded_up(entry["norm"], norm, slack=0)
        assert_rounded_up(entry["relative_error"], error, slack=0 if run.case.exact else 2e-7)


@every_case
def test_entries_say_what_the_layer_was(run):
    for entry, original, _ in run.layers():
        assert entry.keys() == {"dtype", "factors", "format", "kind", "norm", "options", "relative_error", "shape"}
        assert (CODE[entry["dtype"]], tuple(entry["shape"])) == (original.code, original.shape)
        assert entry["kind"] == ("conv" if len(original.shape) > 2 else "linear")
        assert entry["options"].keys() == ({"density"} if entry["format"] == "sparse" else {"rank"})


@every_case
def test_factors_have_the_shapes_of_the_page_and_sparse_ones_the_smallest_encoding(run):
    for file in run.files:
        for name, entry in file.manifest["layers"].items():
            out, fan_in = entry["shape"][0], prod(entry["shape"][1:])
            stored_as = "BF16" if "--dtype bf16" in run.case.options else CODE[entry["dtype"]]
            if entry["format"] == "svd":
                rank = entry["options"]["rank"]
                left, right = (file.tensors[f"{name}.{factor}"] for factor in ("left", "right"))
                assert (left.shape, right.shape) == ((out, rank), (rank, fan_in))
                assert {left.code, right.code} == {stored_as}
                continue
            described = entry["factors"]["matrix"]
            parts = {
                stored: t
                for stored, t in file.tensors.items()
                if stored == f"{name}.matrix" or stored.startswith(f"{name}.matrix.")
            }
            matrix = StrangersFile.factor(file, f"{name}.matrix", described)
            assert matrix.code == stored_as
            assert matrix.shape == (out, fan_in)
            k, s = np.count_nonzero(np.frombuffer(matrix.data, f"<u{WIDTH[stored_as]}")), WIDTH[stored_as]
            assert abs(k - entry["options"]["density"] * out * fan_in) <= 1
            costs = {
                "dense": out * fan_in * s,
                "bitmask": k * s + ceil(out * fan_in / 8),
                "csr": k * (s + (2 if fan_in <= 65536 else 4)) + 8 * (out + 1),
            }
            encoding = described if described == "dense" else described["encoding"]
            assert encoding == min(costs, key=costs.__getitem__)
            assert sum(len(part.data) for part in parts.values()) == costs[encoding]


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
        assert manifest.keys() == {"version", "writer", "source", "tied", "rebuild", "layers", "hashes"}
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
    assert (folder / "config.json").read_bytes() == (run.source / "config.json").read_bytes()
    index = json.loads((folder / "model.tcompress.safetensors.index.json").read_text())
    assert index["weight_map"] == {stored: name for name, file in files.items() for stored in file.tensors}
    assert index["metadata"]["total_size"] == sum(len(t.data) for f in files.values() for t in f.tensors.values())

    text = (folder / "tcompress.json").read_text()
    whole = json.loads(text)
    assert text.rstrip() == json.dumps(whole, sort_keys=True, separators=(",", ":"))
    layers, rebuild, tied = {}, {}, {}
    for file in files.values():
        assert not layers.keys() & file.manifest["layers"].keys()
        layers |= file.manifest["layers"]
        rebuild |= file.manifest["rebuild"]
        tied |= file.manifest["tied"]
        rest = file.manifest.keys() - {"layers", "rebuild", "tied", "hashes"}
        assert all(file.manifest[key] == whole[key] for key in rest)
    assert whole.keys() == {"version", "writer", "source", "tied", "rebuild", "layers"}
    assert (whole["layers"], whole["rebuild"], whole["tied"]) == (layers, rebuild, tied)
