"""tcompress evaluate, as a person uses it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TASK = f"""
import sys
sys.path.append({str(ROOT)!r})
from fixtures.models import DigitsMLP, held_out_images

def model():
    return DigitsMLP()

def evaluate(model):
    images, labels = held_out_images()
    print("evaluating")
    return int((model(images).argmax(1) == labels).sum()) / len(labels)
"""


@pytest.fixture
def small(tcompress, tmp_path, fixtures):
    (tmp_path / "task.py").write_text(TASK)
    done = tcompress(
        "compress", fixtures / "digits_mlp.safetensors", "-f", "svd", "--rank", "24", "-o", "s.safetensors"
    )
    assert done.code == 0
    return Path("s.safetensors")


def test_a_table_and_a_page_show_both_models(tcompress, small, fixtures):
    dense = fixtures / "digits_mlp.safetensors"
    done = tcompress(
        "evaluate", small, "--task", "task.py", "--against", dense, "--report", "page.md", "--threads", "1"
    )
    assert (done.code, done.err) == (0, "evaluating\nevaluating\n")
    head, *rows = [line.split() for line in done.out.splitlines()]
    assert head == ["dense", "compressed", "compressed", "/", "dense"]
    assert [row[0] for row in rows[:5]] == ["score", "bytes", "latency,", "latency,", "peak"]
    assert rows[0][1] == "0.9361"
    assert rows[2][-2:][0] == "ms"
    assert float(rows[1][-1]) == round(small.stat().st_size / dense.stat().st_size, 3)
    page = Path("page.md").read_text().splitlines()
    assert page[2] == "|  | dense | compressed | compressed / dense |"
    assert page[4].startswith("| score | 0.9361 | ")
    assert all(line.count("|") == 5 for line in page[2:9])


def test_json_is_the_only_thing_on_stdout_and_its_keys_stay(tcompress, small):
    with Path("task.py").open("a") as file:
        file.write("\ndef example_inputs():\n    return held_out_images()[0][:5]\n")
    done = tcompress("evaluate", small, "--task", "task.py", "--json", "--report", "page.json", "--cache", "never")
    assert done.code == 0
    document = json.loads(done.out)
    assert json.loads(Path("page.json").read_text()) == document
    assert list(document) == [
        "schema", "command", "tool", "task", "inputs", "device", "threads", "cache", "rows", "compressed_over_dense",
        "notes", "seconds", "peak_memory_bytes",
    ]  # fmt: skip
    dense, compressed = document["rows"]
    assert list(dense) == [
        "name", "path", "bytes", "scores", "latency_ms", "peak_memory_bytes", "peak_gpu_bytes", "seconds",
    ]  # fmt: skip
    assert (dense["name"], compressed["name"]) == ("decompressed", "compressed")
    assert document["compressed_over_dense"]["bytes"] == compressed["bytes"] / dense["bytes"]
    assert document["compressed_over_dense"]["scores"] == {"score": 1.0}
    assert document["compressed_over_dense"]["peak_gpu_bytes"] is None
    assert set(compressed["latency_ms"]) == {"1", "32"}
    assert (document["cache"], document["inputs"]) == ("never", "example_inputs")


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (None, 2, "error: task.py: there is no such task file\n"),
        ("x = (\n", 2, "error: task.py:1: is no Python: '(' was never closed\n"),
        ("", 2, "error: task.py: has no function model; write: def model() -> torch.nn.Module; and has no function "),
        ("def model(n): ...\ndef evaluate(model): ...", 2, "error: task.py: its model cannot be called with 0 "),
        ("def f():\n    1 / 0\nf()\n", 9, "error: task.py:2: ZeroDivisionError: division by zero\n"),
        ("raise ValueError('\\x1b[31m\\n::error::')", 9, "error: task.py:1: ValueError: \\x1b[31m ::error::\n"),
    ],
    ids=["missing", "syntax", "empty", "parameters", "raises", "hostile"],
)
def test_a_wrong_task_is_one_line_before_anything_is_read(tcompress, tmp_path, text, code, says):
    if text is not None:
        (tmp_path / "task.py").write_text(text)
    done = tcompress("evaluate", "no-such-file.safetensors", "--task", "task.py")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(says)
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ("def evaluate(model): return float('nan')", 9, "task.py: evaluate gives nan as score; scores must be finite"),
        ("def evaluate(model): raise KeyError('x')", 9, "task.py:14: KeyError: 'x'"),
        (
            "def example_inputs(): return 3",
            9,
            "task.py: example_inputs gives int; it must give a tensor, tuple or dict",
        ),
        ("import torch\ndef model(): return torch.nn.Linear(2, 2)", 4, "s.safetensors: "),
    ],
    ids=["nan", "raises", "inputs", "another model"],
)
def test_what_goes_wrong_while_evaluating_is_one_line(tcompress, small, more, code, says):
    with Path("task.py").open("a") as file:
        file.write(f"\n{more}\n")
    done = tcompress("evaluate", small, "--task", "task.py")
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: {says}")
    assert done.err.count("\n") == 1


def test_a_dense_checkpoint_an_odd_report_and_an_odd_cache_are_usage_errors(tcompress, small, fixtures):
    dense = fixtures / "digits_mlp.safetensors"
    done = tcompress("evaluate", dense, "--task", "task.py")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "is not a compressed checkpoint; make one with `tcompress compress`" in done.err
    assert tcompress("evaluate", small, "--task", "task.py", "--report", "page.txt").code == 2
    assert tcompress("evaluate", small, "--task", "task.py", "--cache", "seldom").code == 2
    assert tcompress("evaluate", small).code == 2


def test_the_help_says_that_code_is_run(tcompress):
    done = tcompress("evaluate", "--help")
    assert "This runs the code in the task file" in done.out
    assert "Example: tcompress evaluate " in done.out


def test_ctrl_c_ends_the_models_process_too_without_a_traceback(small, tmp_path):
    with Path("task.py").open("a") as file:
        file.write("\nimport os, time\ndef evaluate(model):\n")
        file.write(
            "    open('pid.tmp', 'w').write(str(os.getpid()))\n    os.rename('pid.tmp', 'pid')\n    time.sleep(60)\n"
        )
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from tcompress.cli.app import run; sys.exit(run(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "evaluate", str(small), "--task", "task.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not Path("pid").exists():
        time.sleep(0.05)
    child = int(Path("pid").read_text())
    os.kill(child, signal.SIGINT)  # not heard: its traceback would stand beside the one line
    time.sleep(0.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "error: interrupted; nothing was written\n")
    assert time.monotonic() - started < 4
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
