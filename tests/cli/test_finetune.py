"""tcompress finetune, as a person uses it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import get_args

import pytest
from typer.models import OptionInfo

from tcompress.cli.finetune import Teacher
from tcompress.training.methods import METHODS
from tests.training.tasks import MLP


@pytest.fixture
def small(tcompress, tmp_path, fixtures):
    (tmp_path / "task.py").write_text(MLP)
    source = fixtures / "digits_mlp.safetensors"
    assert tcompress("compress", source, "-f", "svd", "--rank", "4", "-o", "small.safetensors").code == 0
    return Path("small.safetensors")


def test_a_table_a_page_and_a_history_show_what_was_won(tcompress, small, fixtures):
    dense = fixtures / "digits_mlp.safetensors"
    done = tcompress("finetune", small, "--task", "task.py", "-o", "t.safetensors", "--against", dense,
                     "--report", "page.md", "--device", "cpu")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    head, score, nbytes, *rest = done.out.splitlines()
    assert head.split() == ["dense", "compressed", "tuned"]
    name, first, before, after = score.split()
    assert (name, first) == ("accuracy", "0.9361")
    assert float(after) > float(before)
    assert nbytes.split()[0] == "bytes"
    assert rest[0].startswith("finetune: 15 steps in 3 epoch(s) on cpu, fp32, in ")
    assert rest[-1] == "wrote t.safetensors"
    page = Path("page.md").read_text()
    assert "| 3 | 15 | " in page
    assert len(Path("t.safetensors.history.csv").read_text().splitlines()) == 5
    assert tcompress("verify", "t.safetensors", "--against", dense).code == 0
    assert tcompress("decompress", "t.safetensors", "-o", "d.safetensors").code == 0


def test_json_is_the_only_thing_on_stdout_and_its_keys_stay(tcompress, small, fixtures):
    dense = fixtures / "digits_mlp.safetensors"
    method = ["--method", "distill", "--teacher", dense, "--alpha", "0.5", "--kl-direction", "teacher-student"]
    files = ["--report", "r.json", "--history", "h.json"]
    done = tcompress("finetune", small, "--task", "task.py", *method, *files, "--epochs", "1", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert json.loads(Path("r.json").read_text()) == document
    assert list(document) == [
        "schema", "command", "tool", "task", "method", "dense", "before", "after", "output", "best_epoch", "steps",
        "history", "device", "processes", "precision", "problem", "notes", "seconds", "peak_memory_bytes",
    ]  # fmt: skip
    assert document["method"] == {
        "name": "distill", "alpha": 0.5, "temperature": 3.0, "kl_direction": "teacher-student", "through_codes": True,
    }  # fmt: skip
    assert document["output"]["path"] == "small.tuned.safetensors"
    assert document["history"] == json.loads(Path("h.json").read_text())


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--method", "magic"], 2, "--method: 'magic' is none of finetune, distill"),
        (["--alpha", "0.5"], 2, "--method finetune has no --alpha"),
        (["--teacher", "x"], 2, "--teacher goes with --method distill"),
        (["--history", "x.txt"], 2, "x.txt: --history must end with .csv or .json"),
        (["--report", "x.txt"], 2, "x.txt: must end with .json or .md"),
        (["--task", "none.py"], 2, "none.py: there is no such task file"),
        (["--lr", "0"], 2, "--lr must be above 0"),
        (
            ["--lr", "1e30"],
            6,
            "task.py: step 2: the loss is NaN; a smaller --lr may keep it finite; nothing was written",
        ),
    ],
)
def test_what_goes_wrong_is_one_line(tcompress, small, words, code, says):
    done = tcompress("finetune", small, "--task", "task.py", *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error: {says}")
    assert done.err.count("\n") == 1


def test_every_missing_function_is_named(tcompress, small):
    Path("task.py").write_text("def model(): ...\n")
    done = tcompress("finetune", small, "--task", "task.py")
    assert done.code == 2
    for name in ("train_batches", "loss", "evaluate"):
        assert f"has no function {name}; write: def {name}(" in done.err


def test_what_was_best_before_a_nan_is_written_and_the_exit_code_says_so(tcompress, small):
    with Path("task.py").open("a") as file:
        file.write("\ncalls = 0\nplain = loss\ndef loss(model, batch):\n    global calls\n    calls += 1\n")
        file.write("    return plain(model, batch) / (calls != 8)\n")
    done = tcompress("finetune", small, "--task", "task.py", "-o", "t.safetensors")
    assert done.code == 6
    assert done.err.endswith("may keep it finite; epoch 1 was the best and is written\n")
    assert "wrote t.safetensors" in done.out
    assert tcompress("verify", "t.safetensors").code == 0


def test_without_accelerate_the_way_out_is_said(tcompress, small, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found(name, *rest) if name != "accelerate" else None
    )
    done = tcompress("finetune", small, "--task", "task.py")
    assert (done.code, done.err) == (2, "error: training needs accelerate: pip install 'tcompress[train]'\n")


def test_the_help_says_that_code_is_run(tcompress):
    done = tcompress("finetune", "--help")
    assert "This runs the code in the task file" in done.out
    assert "Example: tcompress finetune " in done.out


def test_the_help_of_teacher_names_the_methods_that_have_one():
    (text,) = {each.help for each in get_args(Teacher) if isinstance(each, OptionInfo)}
    named, _, _ = text.partition(":")
    assert named.split(", ") == [name for name, method in METHODS.items() if method.has_teacher]
