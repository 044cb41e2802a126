"""export_onnx(): the factors are the weights of the graph, and ONNX Runtime answers as torch does."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import OutputError, TaskError, UsageError, VerifyError
from tcompress.formats import make, parse
from tcompress.workflow import exporting
from tcompress.workflow.compression import compress
from tcompress.workflow.exporting import NEEDS, USES, export_onnx
from tcompress.workflow.loading import load_into
from tcompress.workflow.onnx_file import relative_difference
from tcompress.workflow.plan import parse_plan, plan_for
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import load_task

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parent.parent.parent
DIGITS = f"""
import sys
sys.path.append({str(ROOT)!r})
from fixtures.models import *

def model():
    return NETWORKS[NAME]()

def example_inputs():
    return held_out_images()[0][:5]
"""
MIXED = """
import torch
from torch import nn

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(300, 48)
        self.layers = nn.ModuleList([nn.Linear(48, 48) for _ in range(3)])
        self.again = nn.Linear(48, 48)
        self.again.weight = self.layers[0].weight
        self.round = nn.Conv1d(48, 64, 3, padding="same", padding_mode="circular")
        self.grouped = nn.Conv1d(64, 96, 5, stride=2, padding=2, groups=2)

    def forward(self, ids, scale=None):
        x = self.table(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return {"y": self.grouped(self.round(self.again(x).transpose(1, 2))), "first": x[:, 0]}

def model():
    torch.manual_seed(0)
    return Mixed()

def example_inputs():
    return {"ids": torch.arange(24).reshape(2, 12) * 7}
"""


@pytest.fixture
def export(tmp_path, fixtures):
    """Compress a fixture, or the model of MIXED, and export it."""

    def call(name, setting, *, dtype=None, more="", inside="", out="m.onnx", **options):
        source, file = fixtures / f"{name}.safetensors", tmp_path / "task.py"
        text = DIGITS.replace("NAME", repr(name.removesuffix("_bf16"))) if source.exists() else MIXED
        file.write_text(f"{text}\n{more}\n")
        task = load_task(str(file), NEEDS, USES)
        if not source.exists():
            source = tmp_path / "mixed.pt"
            torch.save(task.model().to(inside or torch.float32).state_dict(), source)
        kind = parse_plan(setting, "plan") if isinstance(setting, dict) else plan_for(make(*parse(setting)))
        compress(open_checkpoint(source), kind, out=tmp_path / "s.safetensors", force=True, settings=Settings(dtype))
        return export_onnx(open_checkpoint(tmp_path / "s.safetensors"), task, out=tmp_path / out, **options)

    return call


def weights_of(path):
    found = onnx.load(path).graph.initializer
    return {each.name: tuple(each.dims) for each in found}


def require_factors(result):
    """No weight of the dense size is there for a layer that is said to run through its factors."""
    sizes = weights_of(result.path)
    for layer in result.layers:
        own = {name: math.prod(size) for name, size in sizes.items() if name.startswith(layer.name.rpartition(".")[0])}
        if layer.reason is None:
            assert layer.operations < layer.dense_operations
            least = 1 if layer.format == "joint" else 2  # what members share is there once
            assert len([size for name, size in own.items() if not name.endswith(".bias")]) >= least
            assert max(own.values()) < math.prod(layer.shape)
    largest = max(math.prod(layer.shape) for layer in result.layers)
    if all(layer.reason is None for layer in result.layers):
        assert largest not in map(math.prod, sizes.values())


def answers(path, *values):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([each.name for each in session.get_inputs()], values, strict=True)))


def test_a_low_rank_layer_is_two_products_and_the_batch_size_stays_open(export, tmp_path):
    result = export("digits_mlp", "svd:rank=8")
    assert weights_of(result.path) == {
        "input.in_map.weight": (8, 64), "input.out_map.weight": (128, 8), "input.out_map.bias": (128,),
        "hidden.in_map.weight": (8, 128), "hidden.out_map.weight": (128, 8), "hidden.out_map.bias": (128,),
        "output.in_map.weight": (8, 128), "output.out_map.weight": (10, 8), "output.out_map.bias": (10,),
    } | {name: size for name, size in weights_of(result.path).items() if size == (2,)}  # fmt: skip
    assert result.operators["Gemm"] == 6
    assert result.nbytes == result.path.stat().st_size < result.dense_bytes / 3
    assert max(result.differences.values()) < 1e-5
    assert list(result.differences) == [1, 3]
    task = load_task(str(tmp_path / "task.py"), NEEDS, USES)
    model = load_into(task.model(), tmp_path / "s.safetensors").eval()
    for size in (1, 7):
        images = torch.rand(size, 1, 8, 8, generator=torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected = model(images)
        (found,) = answers(result.path, images.numpy())
        assert relative_difference([torch.from_numpy(found)], [expected]) < 1e-5


def test_factors_of_convolutions_are_convolutions(export):
    result = export("digits_cnn", "svd:rank=8:matricisation=spatial")
    sizes = weights_of(result.path)
    assert sizes["conv2.along_others.weight"] == (8, 16, 1, 3)
    assert sizes["conv2.along_first.weight"] == (32, 8, 3, 1)
    require_factors(result)


def test_codes_become_values_and_what_saves_nothing_is_dense(export):
    result = export("digits_cnn", "tt:rank=6", dtype=torch.int8)
    require_factors(result)
    assert weights_of(result.path)["conv2.middle.weight"] == (6, 6, 3, 3)
    assert any("unpacked" in note for note in result.notes)


def test_the_same_checkpoint_gives_the_same_bytes_without_a_trace_of_where_it_was_made(export, tmp_path):
    first = export("digits_mlp", "svd:rank=4").path.read_bytes()
    second = export("digits_mlp", "svd:rank=4", out="n.onnx").path.read_bytes()
    assert first == second
    for word in (str(ROOT), str(tmp_path), sys.prefix, "stack_trace", ".py"):
        assert word.encode() not in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "n.onnx", "s.safetensors", "task.py"]


def test_every_kind_of_layer_ties_groups_paddings_and_inputs_by_name(export):
    result = export("mixed", "svd:rank=6", inside=torch.bfloat16)
    sizes, by_name = weights_of(result.path), {layer.name: layer for layer in result.layers}
    assert by_name["table.weight"].reason == "an embedding's rows are looked up, not computed"
    assert sizes["grouped.grouped.shared.in_map.weight"] == (6, 32, 5)
    assert sizes["round.in_map.weight"] == (6, 48, 3)
    assert "layers.0.in_map.weight.T" in sizes
    assert not any(name.startswith("again.in_map") for name in sizes)
    require_factors(result)
    assert max(result.differences.values()) < 1e-5
    ids = (torch.arange(5 * 12).reshape(5, 12) % 300).numpy()
    assert [each.shape for each in answers(result.path, ids)] == [(5, 96, 6), (5, 48)]


def test_code_that_asks_a_layer_for_its_weight_or_sizes_still_gets_them(export):
    more = """
class Asking(Mixed):
    def forward(self, ids):
        x = super().forward(ids)["first"]
        return nn.functional.linear(x, self.layers[1].weight).reshape(-1, self.layers[2].out_features)

def model():
    return Asking()
"""
    result = export("mixed", "svd:rank=6", more=more)
    assert max(result.differences.values()) < 1e-5


def test_a_layer_of_which_only_the_weight_is_used_is_dense(export):
    more = """
class Asking(Mixed):
    def forward(self, ids):
        return nn.functional.linear(self.layers[0](self.table(ids)), self.layers[1].weight)

def model():
    return Asking()
"""
    by_name = {layer.name: layer for layer in export("mixed", "svd:rank=6", more=more).layers}
    assert by_name["layers.0.weight"].reason is None
    assert by_name["layers.1.weight"].reason == "the model's code takes its weight instead of calling it"


def test_a_model_that_is_one_layer_and_inputs_from_calibration(export):
    more = """
def model():
    return nn.Linear(48, 64)

def calibration_batches():
    yield (torch.rand(4, 48),)

example_inputs = None
"""
    result = export("mixed", "svd:rank=6", more=more)
    assert (result.inputs, result.layers[0].name) == ("calibration_batches", "weight")
    assert answers(result.path, torch.rand(7, 48).numpy())[0].shape == (7, 64)


def test_sizes_that_the_task_leaves_open_stay_open(export):
    more = "def dynamic_shapes():\n    return {'ids': {0: 'batch', 1: 'length'}}"
    result = export("mixed", "svd:rank=6", more=more)
    assert list(result.differences) == [2]
    ids = (torch.arange(3 * 20).reshape(3, 20) % 300).numpy()
    assert [each.shape for each in answers(result.path, ids)] == [(3, 96, 10), (3, 48)]


def test_a_layer_that_torch_loads_dense_is_told_of(export):
    more = """
class Own(nn.Linear):
    def forward(self, x): return super().forward(x)

def model():
    found = DigitsMLP()
    found.hidden = Own(128, 128)
    return found
"""
    result = export("digits_mlp", "svd:rank=4", more=more)
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["hidden.weight"].reason == "Own has a forward of its own"
    assert by_name["input.weight"].reason is None
    assert weights_of(result.path)["hidden.weight"] == (128, 128)


def test_a_model_that_writes_its_batch_size_down_is_told_of(export, tmp_path):
    more = "class Flat(DigitsMLP):\n    def forward(self, x): return super().forward(x.reshape(len(x), 64))\n"
    with pytest.raises(TaskError, match=r"task\.py: torch exports the model for batches of 2 only"):
        export("digits_mlp", "svd:rank=4", more=more + "def model(): return Flat()")
    assert not (tmp_path / "m.onnx").exists()


def test_a_model_that_torch_cannot_trace_is_one_line(export, tmp_path, capfd):
    more = "class Odd(DigitsMLP):\n    def forward(self, x): return super().forward(x) if x.sum() > 0 else x\n"
    with pytest.raises(TaskError, match=r"task\.py: torch cannot export the model as ONNX: ") as caught:
        export("digits_mlp", "svd:rank=4", more=more + "def model(): return Odd()")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.safetensors", "task.py"]


def test_answers_that_differ_leave_nothing_behind(export, tmp_path, monkeypatch):
    monkeypatch.setitem(exporting.ALLOWED, torch.float32, 1e-12)
    with pytest.raises(VerifyError, match=r"m\.onnx: ONNX Runtime's answers differ from torch's by .* at batch size 1"):
        export("digits_mlp", "svd:rank=4")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.safetensors", "task.py"]


def test_inputs_outputs_and_packages_are_asked_for_before_any_work(export, tmp_path, fixtures, monkeypatch):
    with pytest.raises(UsageError, match=r"task\.py: has neither .*; write: def example_inputs\(\)"):
        export("digits_mlp", "svd:rank=4", more="example_inputs = None")
    with pytest.raises(UsageError, match=r"must end with \.onnx"):
        export("digits_mlp", "svd:rank=4", out="m.pb")
    with pytest.raises(TaskError, match=r"the model does not accept the inputs of example_inputs"):
        export("digits_mlp", "svd:rank=4", more="def example_inputs(): return torch.rand(2, 5)")
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export("digits_mlp", "svd:rank=4")
    assert (tmp_path / "m.onnx").read_text() == "mine"
    task = load_task(str(tmp_path / "task.py"), NEEDS, USES)
    with pytest.raises(UsageError, match="is not a compressed checkpoint"):
        export_onnx(open_checkpoint(fixtures / "digits_mlp.safetensors"), task, out=tmp_path / "n.onnx")
    monkeypatch.setattr(exporting, "MOST_BYTES", 1000)
    with pytest.raises(UsageError, match="an ONNX file holds 1000"):
        export("digits_mlp", "svd:rank=4", force=True)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UsageError, match=r"ONNX needs onnxscript: pip install 'tcompress\[onnx\]'"):
        export("digits_mlp", "svd:rank=4", force=True)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([0.0], [0.0], 0.0),
        ([math.inf, 1.0], [math.inf, 1.0], 0.0),
        ([math.inf, 1.0], [-math.inf, 1.0], math.inf),
        ([math.nan, 1.0], [2.0, 1.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_to_the_largest_value(found, expected, difference):
    assert relative_difference([torch.tensor(found)], [torch.tensor(expected)]) == difference


JOINT = {"version": 1, "rules": [{"match": "layers.*", "format": "joint", "ranks": [2, 6, 6], "together": "band"}]}
ALL = [
    ("digits_cnn", "svd:rank=4", None), ("digits_mlp", "svd:rank=8", torch.int4),
    ("digits_mlp", "svd:rank=8", torch.int3),
    ("digits_mlp_bf16", "svd:rank=8", None), ("digits_mlp", "tucker:rank=2", None),
    ("digits_cnn", "tt:rank=6", None), ("digits_mlp", "tt:rank=4", None), ("digits_cnn", "ttm:rank=2", None),
    ("digits_mlp", "ttm:rank=2", torch.int8), ("digits_cnn", "tucker:rank=4", None),
    ("digits_cnn", "cp:rank=3", None), ("digits_mlp", "cp:rank=2", None), ("digits_cnn", "reshaped-sum:rank=2", None),
    ("digits_mlp", "reshaped-sum:rank=2", None), ("mixed", JOINT, None), ("mixed", "cp:order=1:rank=6", None),
    ("mixed", "tucker:order=1:rank=6", None), ("mixed", "tt:order=1:rank=6", None), ("mixed", "ttm:rank=2", None),
]  # fmt: skip
NONE = [
    ("digits_cnn", "sparse:density=0.1", None), ("digits_mlp", "sparse:density=0.1", torch.int8),
    ("digits_mlp", "low-rank-sparse:rank=2:density=0.05", None), ("digits_cnn", "shuffled:rank=2", None),
    ("digits_mlp", "sparse-product:nonzeros=2", None),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting", "dtype"), ALL, ids=str)
def test_every_format_that_saves_multiplications_is_exported_as_factors(export, name, setting, dtype):
    result = export(name, setting, dtype=dtype)
    assert any(layer.reason is None for layer in result.layers)
    require_factors(result)
    assert max(result.differences.values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "setting", "dtype"), NONE, ids=str)
def test_every_other_format_is_exported_dense_with_a_reason(export, name, setting, dtype):
    result = export(name, setting, dtype=dtype)
    assert result.layers
    assert all(layer.reason for layer in result.layers)
    assert max(result.differences.values()) < 1e-5


@pytest.mark.slow
def test_half_precision_stays_where_onnx_runtime_has_it(export):
    result = export("mixed", "svd:rank=6", inside=torch.float16, more="old = model\ndef model(): return old().half()")
    assert {each.data_type for each in onnx.load(result.path).graph.initializer} <= {10, 7}
    assert result.allowed == 2e-2


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(export, tmp_path):
    first = export("digits_cnn", "cp:rank=3").path.read_bytes()
    command = [sys.executable, "-m", "tcompress", "export", "s.safetensors", "--onnx", "n.onnx", "--task", "task.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "5"}
    subprocess.run([*command, "--threads", "1"], cwd=tmp_path, check=True, env=environment, capture_output=True)
    assert (tmp_path / "n.onnx").read_bytes() == first
