"""Files that lie about their factors: each is refused by the name of its tensor, soon, and without much memory."""

from __future__ import annotations

import copy
import json
import re
import resource
import signal
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, SafetyError, UnsupportedError
from tcompress.formats import FORMATS, parse
from tcompress.formats.options import make
from tcompress.version import __version__
from tcompress.workflow.decompression import decompress
from tcompress.workflow.inspection import inspect
from tcompress.workflow.verification import verify
from tests.hostile.corpus_compressed import sealed

MEMORY = 2 << 30  # what a command may take beside what is there before it
SECONDS = 20
LAYER = "fc.weight"
SHARED = "shared.g."


@pytest.fixture(autouse=True)
def limited():
    """Take memory and time away, so that what takes too much of them fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    alarm = signal.signal(signal.SIGALRM, out_of_time)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, alarm)
    resource.setrlimit(resource.RLIMIT_AS, before)


def out_of_time(*_):
    raise TimeoutError(f"took more than {SECONDS} seconds")


@dataclass
class Forged:
    """A compressed file before it is written: the manifest and the tensors, to be changed."""

    document: dict
    tensors: dict

    @property
    def entry(self):
        return self.document["layers"][LAYER]

    @property
    def options(self):
        return self.entry["options"]

    def put(self, factor, *shape):
        """Give a factor of the layer, there already or not, another shape."""
        self.tensors[f"{LAYER}.{factor}"] = torch.zeros(shape)
        self.entry["factors"][factor] = "dense"

    def drop(self, *factors):
        for factor in factors:
            del self.tensors[f"{LAYER}.{factor}"], self.entry["factors"][factor]

    def only(self, options, shape, **factors):
        """Make the layer one of these options, of this shape, of factors that are zero."""
        self.drop(*list(self.entry["factors"]))
        self.entry.update(options=options, shape=list(shape))
        for factor, size in factors.items():
            self.put(factor.replace("_", ".") if "_basis" not in factor else factor, *size)

    def write(self, path):
        path.write_bytes(sealed(self.document, self.tensors))  # with true hashes, which are looked at first
        return path


def forge(text, *shapes):
    """A sound file, to be changed."""
    return copy.deepcopy(sound(text, *shapes))


@lru_cache
def sound(text, *shapes):
    """A sound file of one layer for each shape; the layers of a joint format are one group."""
    kind, options = parse(text)
    setting = make(kind, options)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    layers, tensors, shared = {}, {"bias": torch.ones(3)}, {}
    if kind.name == "joint":
        common, own = setting.fit_together(weights)
        tensors |= {f"{SHARED}{name}": factor for name, factor in common.items()}
        shared = {"shared": {"g": dict.fromkeys(common, "dense")}}
    else:
        own = [setting.fit(weight).state_dict() for weight in weights]
    for number, (weight, factors) in enumerate(zip(weights, own, strict=True)):
        name = LAYER if number == 0 else f"fc{number}.weight"
        rebuilt = setting.load(tuple(weight.shape), {**(common if shared else {}), **factors}).reconstruct().detach()
        layers[name] = {
            "format": kind.name,
            "options": json.loads(json.dumps(setting.pinned(tuple(weight.shape)).options())),
            "kind": "linear" if weight.ndim == 2 else "conv",
            "shape": list(weight.shape),
            "dtype": "float32",
            "norm": float(weight.norm()),
            "relative_error": float((weight - rebuilt).norm() / weight.norm()),
            "factors": dict.fromkeys(factors, "dense"),
            **({"group": "g"} if shared else {}),
        }
        tensors |= {f"{name}.{factor}": values.clone().contiguous() for factor, values in factors.items()}
    document = {"version": 1, "writer": "w", "source": {}, "tied": {}, "rebuild": {}, "layers": layers, **shared}
    return Forged(document, {name: tensor.detach() for name, tensor in tensors.items()})


def answer(command):
    """What a command says against a file; None where nothing. It fails in no other way than this."""
    try:
        result = command()
    except (InputError, SafetyError) as error:
        return str(error)
    return "\n".join(getattr(result, "problems", ())) or None


def refusal(path, tensor=LAYER):
    """Return what decompress says; it names the tensor, and so does verify. No command fails in any other way."""
    seen = answer(lambda: inspect(open_checkpoint(path)))
    assert seen is None or f"tensor {tensor}: " in seen
    assert f"tensor {tensor}: " in (answer(lambda: verify(open_checkpoint(path))) or "")
    message = answer(lambda: decompress(open_checkpoint(path), out=path.with_name("dense.safetensors"))) or ""
    assert not path.with_name("dense.safetensors").exists()
    assert message.startswith(f"{path}: tensor {tensor}: "), message
    return message.removeprefix(f"{path}: tensor {tensor}: ")


MATRIX, KERNEL = (24, 20), (8, 6, 3, 3)
SOUND = {
    "svd": "svd:rank=3:matricisation=spatial",
    "tt": "tt:rank=3",
    "ttm": "ttm:rank=3",
    "tucker": "tucker:rank=3:order=2",
    "cp": "cp:rank=3",
    "reshaped-sum": "reshaped-sum:rank=2",
    "sparse-product": "sparse-product:nonzeros=3:count=3",
    "sparse": "sparse:density=0.5",
    "low-rank-sparse": "low-rank-sparse:low_rank=tt:rank=3:density=0.3:rounds=3",
    "shuffled": "shuffled:inner=tt:rank=3",
    "joint": "joint:rank=3",
}


@pytest.mark.parametrize("shape", [MATRIX, KERNEL], ids=["matrix", "kernel"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_the_forger_starts_from_is_sound(name, shape, tmp_path):
    path = forge(SOUND[name], shape, shape).write(tmp_path / "small.safetensors")
    assert len(inspect(open_checkpoint(path)).rows) == 3
    result = verify(open_checkpoint(path))
    assert [problem for problem in result.problems if ": tensor " in problem] == []
    decompress(open_checkpoint(path), out=tmp_path / "dense.safetensors")
    assert load_file(tmp_path / "dense.safetensors")[LAYER].shape == shape


FOLDED = ("tt", "ttm", "tucker", "cp")


@pytest.mark.parametrize(
    "options",
    [
        {"out_modes": [4, 7]},
        {"out_modes": [1 << 20, 1 << 20]},
        {"out_modes": [1 << 20, 1 << 20], "padding": [(1 << 40) - 24, 0]},
        {"in_modes": [41, 1], "padding": [0, 21]},
        {"in_modes": [19, 1], "padding": [0, -1]},
        {"padding": [0, 1]},
        {"padding": [-24, 0]},
        {"padding": 0},
        {"padding": [0]},
        {"padding": [[0], [0]]},
        {"padding": ["0", "0"]},
        {"padding": {"0": 0}},
        {"padding": [0.0, 0.0]},
        {"out_modes": []},
        {"out_modes": [24, 0]},
        {"out_modes": [-4, -6]},
        {"out_modes": 24},
        {"out_modes": "4,6"},
        {"out_modes": ["4", "6"]},
        {"out_modes": [[4, 6]]},
        {"out_modes": [True, 24]},
        {"out_modes": {"a": 4}},
        {"order": 2},
        {"order": 0},
        {"order": "2"},
        {"order": [2]},
        {"rank": 0},
        {"rank": -3},
        {"rank": 1.5},
        {"rank": "3"},
        {"rank": [3]},
        {"rank": None},
        {"rank": True},
        {"ranks": [3]},
        {"rank": None, "ranks": []},
        {"rank": None, "ranks": [3, 0, 3]},
        {"rank": None, "ranks": ["3", "3", "3"]},
        {"rank": None, "ranks": {"0": 3}},
        {"unheard": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FOLDED)
def test_senseless_options_of_a_folded_format_are_refused(name, options, tmp_path):
    forged = forge(SOUND[name], MATRIX)
    forged.options.update(options)
    refusal(forged.write(tmp_path / "small.safetensors"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("svd", {"matricisation": "diagonal"}),
        ("svd", {"matricisation": ["spatial"]}),
        ("svd", {"matricisation": {}}),
        ("svd", {"rank": 0}),
        ("svd", {"rank": [3]}),
        ("cp", {"seed": -1}),
        ("cp", {"seed": "0"}),
        ("cp", {"starts": 0}),
        ("cp", {"starts": [3]}),
        ("reshaped-sum", {"reshapes": []}),
        ("reshaped-sum", {"reshapes": "channel"}),
        ("reshaped-sum", {"reshapes": ["channel", "diagonal"]}),
        ("reshaped-sum", {"reshapes": [["channel"], ["paired"]]}),
        pytest.param(
            "reshaped-sum",
            {"reshapes": [{"a": 1}, "paired"]},
        ),
        ("reshaped-sum", {"reshapes": ["channel"]}),
        pytest.param("reshaped-sum", {"reshapes": ["paired", "channel"]}),
        ("reshaped-sum", {"ranks": [1, 1]}),
        ("reshaped-sum", {"rank": None, "ranks": [0, 0]}),
        ("reshaped-sum", {"rank": None, "ranks": [2]}),
        ("reshaped-sum", {"rank": None, "ranks": [2, -1]}),
        ("reshaped-sum", {"rank": 0}),
        ("reshaped-sum", {"padding": [1, -1]}),
        ("reshaped-sum", {"out_modes": [1 << 20, 1 << 20], "padding": [(1 << 40) - 24, 0]}),
        ("sparse-product", {"nonzeros": 0}),
        ("sparse-product", {"nonzeros": "3"}),
        ("sparse-product", {"count": 1}),
        ("sparse-product", {"count": [2]}),
        ("shuffled", {"seed": -1}),
        ("shuffled", {"seed": 1 << 32}),
        ("shuffled", {"seed": 1.0}),
        ("shuffled", {"seed": [1]}),
        ("shuffled", {"inner": "shuffled"}),
        ("shuffled", {"inner": "shuffled:inner=tt"}),
        ("shuffled", {"inner": "joint"}),
        ("shuffled", {"inner": "sparse"}),
        ("shuffled", {"inner": "magic"}),
        ("shuffled", {"inner": ""}),
        ("shuffled", {"inner": ["tt"]}),
        ("shuffled", {"inner": {"tt": 1}}),
        ("shuffled", {"inner": None}),
        ("shuffled", {"inner": "tt:rank=3"}),
        ("shuffled", {"inner": "tt:ranks=3,3,3"}),
        ("shuffled", {"inner": "tt:out_modes"}),
        ("shuffled", {"inner": "tt:out_modes=4=6"}),
        ("shuffled", {"inner": "tt:out_modes=a,b"}),
        ("shuffled", {"inner": "tt:inner.out_modes=4,6"}),
        ("shuffled", {"inner": "tt:unheard=1"}),
        pytest.param(
            "shuffled",
            {"inner": "tt:order=" + "[" * 100_000},
        ),
        ("shuffled", {"inner": "tt:order=" + "9" * 5000}),
        ("shuffled", {"inner": "svd"}),
        ("shuffled", {"rank": 0}),
        ("shuffled", {"rank": None, "ranks": [0, 1, 1]}),
        ("joint", {"method": "magic"}),
        ("joint", {"method": ["svd"]}),
        ("joint", {"method": "svd"}),
        ("joint", {"rank": 0}),
        ("joint", {"rank": None, "ranks": [1, 1]}),
        ("joint", {"rank": None, "ranks": [1, 0, 1]}),
        ("joint", {"rank": None, "ranks": ["1", "1", "1"]}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_senseless_options_are_refused(name, options, tmp_path):
    forged = forge(SOUND[name], MATRIX, MATRIX)
    forged.options.update(options)
    refusal(forged.write(tmp_path / "small.safetensors"))


def test_options_nested_without_end_are_refused(tmp_path):
    forged = forge("svd:rank=3", MATRIX)
    for _ in range(600):
        forged.options["rank"] = [forged.options["rank"]]
    refusal(forged.write(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_factor_is_refused(name, tmp_path):
    for factor in sound(SOUND[name], MATRIX).entry["factors"]:
        forged = forge(SOUND[name], MATRIX)
        forged.drop(factor)
        if not forged.entry["factors"]:
            forged.put("other", 1)
        refusal(forged.write(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "factor", ["surplus", "cores.4", "cores.x", "factors.9", "terms.5.left", "inner.left", "", "a.b"]
)
def test_a_surplus_factor_is_refused(name, factor, tmp_path):
    forged = forge(SOUND[name], MATRIX)
    forged.put(factor, 1)
    refusal(forged.write(tmp_path / "small.safetensors"))


SHAPES = [(), (1,), (3,), (1, 1), (0, 0), (24, 20), (1, 1, 1), (7, 4, 7), (1, 4, 4, 1), (1,) * 9]
PAIRS = [pytest.param(name, shape, id=f"{name}-{shape}") for name in FORMATS for shape in SHAPES]


@pytest.mark.parametrize(("name", "shape"), PAIRS)
def test_factors_of_wrong_shapes_are_refused(name, shape, tmp_path):
    for factor, values in sound(SOUND[name], MATRIX).tensors.items():
        if factor == "bias" or values.shape == shape:
            continue
        forged = forge(SOUND[name], MATRIX)
        forged.tensors[factor] = torch.zeros(shape)
        refusal(forged.write(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("name", FORMATS)
def test_factors_that_are_no_floats_are_refused(name, dtype, tmp_path):
    forged = forge(SOUND[name], MATRIX)
    forged.tensors = {key: tensor.to(dtype) for key, tensor in forged.tensors.items()}
    assert "is of type" in refusal(forged.write(tmp_path / "small.safetensors"))


ONE_MODE = {"rank": 1, "out_modes": [24], "in_modes": [20]}
TWO_MODES = {"rank": 1, "out_modes": [4, 6], "in_modes": [4, 5]}
UNEVEN = [
    pytest.param("tt", TWO_MODES, {"cores_0": (1, 24, 1), "cores_1": (1, 20, 1)}),
    pytest.param("ttm", TWO_MODES, {"cores_0": (1, 24, 20, 1)}),
    ("ttm", ONE_MODE, {"cores_0": (1, 4, 4, 1), "cores_1": (1, 6, 5, 1)}),
    pytest.param("tucker", ONE_MODE, {"core": (1,)}),
    pytest.param("tucker", ONE_MODE, {"core": (1, 1), "factors_0": (24, 1)}),
    pytest.param(
        "tucker",
        ONE_MODE,
        {"core": (1,) * 5, **{f"factors_{n}": (1, 1) for n in range(4)}},
    ),
    ("cp", ONE_MODE, {"weights": (1,), "factors_0": (24, 1)}),
]


@pytest.mark.parametrize(("name", "options", "factors"), UNEVEN)
def test_factors_of_another_number_of_modes_than_the_options_name_are_refused(name, options, factors, tmp_path):
    forged = forge(SOUND[name], MATRIX)
    forged.only(options, MATRIX, **factors)
    refusal(forged.write(tmp_path / "small.safetensors"))


EMPTY = {
    "tt": {"cores_0": (1, 4, 0), "cores_1": (0, 6, 0), "cores_2": (0, 4, 0), "cores_3": (0, 5, 1)},
    "ttm": {"cores_0": (1, 4, 5, 0), "cores_1": (0, 6, 4, 1)},
    "tucker": {"core": (0, 0, 0, 0, 1), **{f"factors_{n}": (mode, 0) for n, mode in enumerate((4, 6, 4, 5))}},
    "joint": {"mix": (0,)},
}


@pytest.mark.parametrize("name", EMPTY)
def test_ranks_of_nothing_are_refused(name, tmp_path):
    forged = forge(SOUND[name], MATRIX)
    forged.only(forged.options, MATRIX, **EMPTY[name])
    if name == "joint":
        forged.tensors[f"{SHARED}core"] = torch.zeros(0, 0, 0, 1)
        forged.tensors |= {f"{SHARED}out_basis": torch.zeros(24, 0), f"{SHARED}in_basis": torch.zeros(20, 0)}
    refusal(forged.write(tmp_path / "small.safetensors"))


@pytest.mark.parametrize("name", ["tt", "ttm", "cp"])
def test_tiny_factors_that_fit_a_tensor_of_terabytes_are_refused(name, tmp_path):
    """The weight is (24, 20), its padding all the rest."""
    options = {"rank": 1, "out_modes": [4] * 10, "in_modes": [4] * 10, "padding": [(1 << 20) - 24, (1 << 20) - 20]}
    factors = {
        "tt": {f"cores_{n}": (1, 4, 1) for n in range(20)},
        "ttm": {f"cores_{n}": (1, 4, 4, 1) for n in range(10)},
        "cp": {"weights": (1,), **{f"factors_{n}": (16, 1) for n in range(10)}},
    }[name]
    forged = forge(SOUND[name], MATRIX)
    forged.only(options, MATRIX, **factors)
    problem = refusal(forged.write(tmp_path / "small.safetensors"))
    assert problem == f"{name}: a padding of {(1 << 20) - 24} on a size of 24 makes no sense"


TWOS = {"rank": 100, "out_modes": [2] * 12, "in_modes": [2] * 12}
TOO_MUCH = {
    "tt": (TWOS, (4096, 4096), {f"cores_{n}": (100 if n else 1, 2, 100 if n < 23 else 1) for n in range(24)}),
    "tucker": (
        {"rank": 1, "out_modes": [100_000], "in_modes": [1]},
        (100_000, 1),
        {"core": (1, 10_000, 1), "factors_0": (100_000, 1), "factors_1": (1, 10_000)},
    ),
    "cp": (
        {"rank": 1, "out_modes": [4] * 4 + [1] * 4, "in_modes": [4] * 4 + [1] * 4},
        (256, 256),
        {"weights": (10_000,), **{f"factors_{n}": (16 if n < 4 else 1, 10_000) for n in range(8)}},
    ),
    "reshaped-sum": (
        {"rank": 1, "reshapes": ["channel"] * 40},
        (4096, 4096),
        {f"terms_{n}_{side}": size for n in range(40) for side, size in (("left", (4096, 1)), ("right", (1, 4096)))},
    ),
    "joint": ({"rank": 1}, (1, 100_000), {"mix": (1,)}),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_small_factors_take_no_gigabytes(name, tmp_path):
    options, shape, factors = TOO_MUCH[name]
    forged = forge(SOUND[name], MATRIX)
    forged.only(options, shape, **factors)
    if name == "joint":
        forged.tensors |= {f"{SHARED}core": torch.zeros(1, 10_000, 1, 1), f"{SHARED}out_basis": torch.zeros(1, 10_000)}
        forged.tensors[f"{SHARED}in_basis"] = torch.zeros(100_000, 1)
    path = forged.write(tmp_path / "small.safetensors")
    answer(lambda: inspect(open_checkpoint(path)))
    answer(lambda: verify(open_checkpoint(path)))
    answer(lambda: decompress(open_checkpoint(path), out=tmp_path / "dense.safetensors"))


def test_a_sparse_factor_that_claims_more_values_than_the_weight_has_is_refused(tmp_path):
    forged = forge(SOUND["sparse-product"], MATRIX)
    del forged.tensors[f"{LAYER}.factors.0"]
    forged.entry["factors"]["factors.0"] = {"encoding": "csr", "shape": [24, 1 << 26]}
    parts = {"values": torch.zeros(0), "columns": torch.zeros(0, dtype=torch.int32)}
    parts["row_starts"] = torch.zeros(25, dtype=torch.int64)
    forged.tensors |= {f"{LAYER}.factors.0.{part}": values for part, values in parts.items()}
    refusal(forged.write(tmp_path / "small.safetensors"))


def test_codes_that_claim_more_values_than_the_weight_has_are_refused(tmp_path):
    forged = forge(SOUND["sparse-product"], MATRIX)
    del forged.tensors[f"{LAYER}.factors.0"]
    forged.entry["factors"]["factors.0"] = {"encoding": "delta8", "shape": [24, 1 << 26], "values": "int4"}
    parts = {"codes": torch.uint8, "scale": torch.float16, "gaps": torch.uint8}
    forged.tensors |= {f"{LAYER}.factors.0.{part}": torch.zeros(0, dtype=dtype) for part, dtype in parts.items()}
    message = refusal(forged.write(tmp_path / "small.safetensors"))
    assert message == "its factor factors.0 claims more values than the weight has"


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"encoding": "dense", "shape": [24, 3], "values": "int2"}, "encoding 'dense' of 'int2'"),
        ({"encoding": "4:2", "shape": [24, 3], "values": "int4"}, "encoding '4:2' of 'int4'"),
        ({"encoding": "2:17", "shape": [24, 3]}, "encoding '2:17'"),
        ({"encoding": "dense", "shape": [24, 3]}, "encoding 'dense'"),
        ("delta8", "encoding 'delta8'"),
        ("2:4", "encoding '2:4'"),
    ],
)
def test_unknown_ways_to_store_a_factor_are_named(tmp_path, described, named):
    forged = forge(SOUND["svd"], MATRIX)
    forged.entry["factors"]["left"] = described
    path = forged.write(tmp_path / "small.safetensors")
    message = f"its factor left has {named}, which this version cannot read; w wrote it"
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        inspect(open_checkpoint(path))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda entry: entry.update(format="svd2"), "has format 'svd2', which this version does not know"),
        (
            lambda entry: entry["factors"].update(left="int2"),
            "its factor left has encoding 'int2', which this version cannot read",
        ),
    ],
    ids=["format", "encoding"],
)
def test_who_can_read_what_is_unknown_is_not_this_version_where_it_is_said_to_have_written_it(tmp_path, change, named):
    forged = forge(SOUND["svd"], MATRIX)
    change(forged.entry)
    for writer, whose in (
        ("tcompress 99.0", "tcompress 99.0 wrote it and can read it"),
        (f"tcompress {__version__}", "nor did it write that: the file was changed, or made by something else"),
    ):
        forged.document["writer"] = writer
        with pytest.raises(UnsupportedError, match=re.escape(f"{named}; {whose}")):
            inspect(open_checkpoint(forged.write(tmp_path / "small.safetensors")))


@pytest.mark.parametrize("part", ["codes", "scale"])
def test_a_missing_part_of_codes_is_refused(tmp_path, part):
    forged = forge(SOUND["svd"], MATRIX)
    left = forged.tensors.pop(f"{LAYER}.left")
    parts = {"codes": torch.zeros(left.shape, dtype=torch.int8), "scale": torch.ones(len(left))}
    forged.entry["factors"]["left"] = {"encoding": "dense", "shape": list(left.shape), "values": "int8"}
    forged.tensors |= {f"{LAYER}.left.{name}": tensor for name, tensor in parts.items() if name != part}
    assert refusal(forged.write(tmp_path / "small.safetensors")) == f"its factor {LAYER}.left.{part} is not in the file"


def test_a_count_of_factors_that_no_file_could_hold_is_found(tmp_path):
    forged = forge(SOUND["sparse-product"], MATRIX)
    forged.options["count"] = 10**9
    path = forged.write(tmp_path / "small.safetensors")
    assert f"tensor {LAYER}: " in answer(lambda: verify(open_checkpoint(path)))


def test_an_order_without_end_is_refused(tmp_path):
    forged = forge(SOUND["tt"], MATRIX)
    forged.options.update(order=5000)
    del forged.options["out_modes"], forged.options["in_modes"]
    refusal(forged.write(tmp_path / "small.safetensors"))


NO_PARTNERS = "its tcompress manifest has groups without members, or members without groups"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda document: document["layers"][LAYER].update(group="h"), NO_PARTNERS),
        (lambda document: document.pop("shared"), NO_PARTNERS),
        (lambda document: document["shared"].update(h={"core": "dense"}), NO_PARTNERS),
        (lambda document: document.update(shared=[]), NO_PARTNERS),
        (
            lambda document: document.update(shared={"g": {}}),
            "tensor g: its manifest entry of shared factors is damaged",
        ),
        (
            lambda document: document["layers"][LAYER].update(group=7),
            f"tensor {LAYER}: its manifest entry names a group",
        ),
        (
            lambda document: document["layers"][LAYER].pop("group"),
            f"tensor {LAYER}: its manifest entry shares factors where its format has none",
        ),
        (
            lambda document: document["layers"][LAYER].update(format="svd", options={"rank": 1}),
            f"tensor {LAYER}: its manifest entry shares factors where its format has none",
        ),
        (lambda document: document["shared"]["g"].pop("core"), f"tensor {LAYER}: joint: has factors"),
        (
            lambda document: document["shared"]["g"].update(extra="dense"),
            "tensor shared.g: its factor shared.g.extra is not",
        ),
        (lambda document: document["layers"][LAYER].update(shape=[20, 24]), f"tensor {LAYER}: joint: "),
        (lambda document: document["layers"]["fc1.weight"].update(shape=[24, 21]), "tensor fc1.weight: joint: "),
        (lambda document: document["layers"][LAYER].update(shape=[24, 20, 2]), f"tensor {LAYER}: joint: "),
    ],
)
def test_groups_that_contradict_their_members_are_refused(change, problem, tmp_path):
    forged = forge(SOUND["joint"], MATRIX, MATRIX)
    change(forged.document)
    path = forged.write(tmp_path / "small.safetensors")
    seen = answer(lambda: inspect(open_checkpoint(path)))
    assert seen is None or problem in seen
    assert problem in answer(lambda: verify(open_checkpoint(path)))
    assert problem in answer(lambda: decompress(open_checkpoint(path), out=tmp_path / "dense.safetensors"))
    assert not (tmp_path / "dense.safetensors").exists()


def test_a_factor_that_is_shared_and_the_layers_own_is_refused(tmp_path):
    forged = forge(SOUND["joint"], MATRIX, MATRIX)
    forged.put("core", 1, 1)
    refusal(forged.write(tmp_path / "small.safetensors"))
