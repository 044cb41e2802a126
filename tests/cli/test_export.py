"""tcompress export, as a person uses it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ROOT = Path(__file__).parent.parent.parent
TASK = f"""
import sys
sys.path.append({str(ROOT)!r})
from fixtures.models import DigitsCNN, held_out_images

def model():
    return DigitsCNN()

def example_inputs():
    print("here they are")
    return held_out_images()[0][:4]
"""


@pytest.fixture
def small(tcompress, tmp_path, fixtures):
    (tmp_path / "task.py").write_text(TASK)
    done = tcompress("compress", fixtures / "digits_cnn.safetensors", "-f", "svd", "--rank", "4", "-o", "s.safetensors")
    assert done.code == 0
    return Path("s.safetensors")


def test_a_table_says_what_became_of_each_layer_and_json_says_the_same(tcompress, small):
    done = tcompress("export", small, "--onnx", "m.onnx", "--task", "task.py", "--threads", "1")
    assert (done.code, done.err) == (0, "here they are\n")
    head, *rows = done.out.splitlines()
    assert head.split() == ["layer", "shape", "format", "weights", "multiplications", "dense"]
    assert rows[0].split() == ["conv2.weight", "32x16x3x3", "svd", "factors", "704", "4608"]
    assert "dense weight: depthwise.weight: its factors would take as many multiplications, or more" in rows
    said = " ".join(" ".join(rows).split())
    assert "of the largest value at most (batch size 1 and 3, inputs of example_inputs)" in said
    assert f"wrote m.onnx: {Path('m.onnx').stat().st_size} bytes; compressed checkpoint {small.stat().st_size}" in said
    again = tcompress("export", small, "--onnx", "m.onnx", "--task", "task.py", "--json")
    assert (again.code, again.out) == (7, "")
    assert again.err.count("exists already; use --force") == 1
    again = tcompress("export", small, "--onnx", "m.onnx", "--task", "task.py", "--json", "--force")
    document = json.loads(again.out)
    assert list(document) == [
        "schema", "command", "tool", "source", "task", "inputs", "output", "dense_bytes", "layers", "opset",
        "operators", "differences", "largest_difference", "allowed_difference", "notes", "seconds",
        "peak_memory_bytes",
    ]  # fmt: skip
    assert document["output"] == {"path": "m.onnx", "bytes": Path("m.onnx").stat().st_size}
    assert document["layers"][0] == {
        "name": "conv2.weight", "format": "svd", "shape": [32, 16, 3, 3], "weights": "factors", "reason": None,
        "multiplications": 704, "dense_multiplications": 4608,
    }  # fmt: skip
    assert document["operators"]["Conv"] == 6
    assert set(document["differences"]) == {"1", "3"}
    assert document["largest_difference"] < 1e-5 < document["allowed_difference"]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ("del example_inputs", 2, "task.py: has neither example_inputs nor calibration_batches; write: def example_in"),
        ("def example_inputs(): return 3", 9, "task.py: example_inputs gives int; it must give a tensor"),
        ("def model(): raise KeyError('x')", 9, "task.py:13: KeyError: 'x'"),
        ("import torch\ndef model(): return torch.nn.Linear(2, 2)", 4, "s.safetensors: does not fit the model Linear"),
        ("model = 3", 2, "task.py: its model is no function but int; write: def model() -> torch.nn.Module"),
        ("dynamic_shapes = 3", 2, "task.py: its dynamic_shapes is no function but int; write: def dynamic_shapes()"),
    ],
    ids=["no inputs", "inputs", "raises", "another model", "no function", "shapes"],
)
def test_a_wrong_task_is_one_line_and_leaves_nothing(tcompress, small, more, code, says):
    with Path("task.py").open("a") as file:
        file.write(f"\n{more}\n")
    done = tcompress("export", small, "--onnx", "m.onnx", "--task", "task.py")
    assert (done.code, done.out) == (code, "")
    assert done.err.removeprefix("here they are\n").startswith(f"error: {says}")
    assert done.err.removeprefix("here they are\n").count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["s.safetensors", "task.py"]


def test_missing_packages_are_named_before_the_task_is_run(tcompress, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    done = tcompress("export", "no-such-file", "--onnx", "m.onnx", "--task", "no-such-task.py")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: ONNX needs onnx, onnxscript, onnxruntime: pip install 'tcompress[onnx]'\n"


def test_the_help_says_that_code_is_run(tcompress):
    done = tcompress("export", "--help")
    assert "This runs the code in the task file" in done.out
    assert "Example: tcompress export " in done.out
