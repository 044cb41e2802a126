"""tcompress calibrate, as a person uses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tcompress.checkpoint.statistics_file import read_statistics

ROOT = Path(__file__).parent.parent.parent
TASK = f"""
import sys
sys.path.append({str(ROOT)!r})
import torch
from fixtures.models import DigitsMLP, training_images

def model():
    return DigitsMLP()

def calibration_batches():
    print("reading")
    return list(training_images()[0][:64].split(32))
"""
LOSS = """
def train_batches():
    images, labels = training_images()
    return [(images[:32], labels[:32])]

def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
"""


@pytest.fixture
def dense(tmp_path, fixtures):
    (tmp_path / "task.py").write_text(TASK)
    return fixtures / "digits_mlp.safetensors"


def test_a_table_shows_the_layers_in_the_order_of_their_calls(tcompress, dense):
    done = tcompress("calibrate", dense, "--task", "task.py", "-o", "stats.safetensors", "--threads", "1")
    assert (done.code, done.err) == (0, "reading\n")
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0] == ["layer", "kind", "inputs", "moment", "positions"]
    assert rows[1] == ["input.weight", "linear", "64", "full", "64"]
    assert [row[0] for row in rows[1:4]] == ["input.weight", "hidden.weight", "output.weight"]
    assert "3 layers on 2 batches; sensitivities are those of the model's output, without labels" in done.out
    assert "wrote stats.safetensors: " in done.out
    assert set(read_statistics("stats.safetensors").layers) == {"input.weight", "hidden.weight", "output.weight"}


def test_json_is_the_only_thing_on_stdout_and_its_keys_stay(tcompress, dense):
    with Path("task.py").open("a") as file:
        file.write(LOSS)
    done = tcompress("calibrate", dense, "--task", "task.py", "--json", "--device", "cpu")
    assert done.code == 0
    document = json.loads(done.out)
    assert list(document) == [
        "schema", "command", "tool", "source", "task", "output", "sensitivity_of", "batches", "positions", "layers",
        "untraced", "spilled", "notes", "seconds", "peak_memory_bytes",
    ]  # fmt: skip
    assert document["layers"][2] == {
        "name": "output.weight", "kind": "linear", "fan_in": 128, "diagonal": False, "positions": 64,
    }  # fmt: skip
    assert (document["sensitivity_of"], document["batches"], document["positions"]) == ("loss", 2, 3 * 64)
    output = document["output"]
    assert output["path"] == "digits_mlp.stats.safetensors", "a name is made of the model's"
    assert output["bytes"] == Path(output["path"]).stat().st_size
    assert read_statistics(output["path"]).source == document["source"]["sha256"]


def test_a_folders_statistics_are_one_file(tcompress, dense):
    done = tcompress("calibrate", dense.parent / "digits_mlp_sharded", "--task", "task.py")
    assert done.code == 0
    assert Path("digits_mlp_sharded-stats.safetensors").is_file()


def test_the_same_calibration_gives_the_same_bytes_and_replaces_nothing_unasked(tcompress, dense):
    command = ["calibrate", dense, "--task", "task.py", "-o", "s.safetensors"]
    assert tcompress(*command).code == 0
    before = Path("s.safetensors").read_bytes()
    again = tcompress(*command)
    assert (again.code, again.out) == (7, "")
    assert again.err == "error: s.safetensors: exists already; use --force to replace it, or another -o\n"
    assert tcompress(*command, "--force").code == 0
    assert Path("s.safetensors").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["s.safetensors", "task.py"]


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        ("def calibration_batches(): return [torch.ones(2, 3)]", 9, "batch 1 of calibration_batches does not fit the"),
        ("def calibration_batches(): return []", 9, "task.py: calibration_batches gives no batch"),
        ("def calibration_batches(): return [torch.full((1, 64), torch.inf)]", 6, "tensor input.weight: its input is"),
        ("def model(): return torch.nn.Linear(2, 2)", 4, "does not fit the model Linear; missing: "),
        ("calibration_batches = None", 2, "task.py: has no function calibration_batches; write: def calibration_"),
        ("def loss(model): ...", 2, "task.py: its loss cannot be called with 2 argument(s)"),
    ],
    ids=["shape", "none", "infinite", "another model", "missing", "parameters"],
)
def test_what_goes_wrong_is_one_line_and_leaves_no_file(tcompress, dense, more, code, says):
    with Path("task.py").open("a") as file:
        file.write(f"\n{more}\n")
    done = tcompress("calibrate", dense, "--task", "task.py", "-o", "s.safetensors")
    assert (done.code, done.out) == (code, "")
    (line,) = [line for line in done.err.splitlines() if line != "reading"]
    assert line.startswith("error: ")
    assert says in line
    assert [path.name for path in Path().iterdir()] == ["task.py"]


def test_layers_that_are_left_out_say_why(tcompress, tmp_path):
    text = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)

def model():
    return Net()

def calibration_batches():
    return [torch.ones(1, 2)]
"""
    (tmp_path / "task.py").write_text(text)
    tensors = {f"{name}.weight": torch.ones(2, 2) + at for at, name in enumerate(("used", "idle"))}
    tensors |= {f"{name}.bias": torch.ones(2) + at for at, name in enumerate(("used", "idle"))}
    torch.save(tensors, tmp_path / "net.pt")
    done = tcompress("calibrate", "net.pt", "--task", "task.py", "--json")
    assert json.loads(done.out)["untraced"] == [{"name": "idle.weight", "reason": "the model does not call it"}]
    done = tcompress("calibrate", "net.pt", "--task", "task.py", "--force")
    assert "left out: idle.weight: the model does not call it" in done.out


def test_a_compressed_model_and_a_missing_task_are_usage_errors(tcompress, dense):
    assert tcompress("compress", dense, "-f", "svd", "--rank", "4", "-o", "small.safetensors").code == 0
    done = tcompress("calibrate", "small.safetensors", "--task", "task.py")
    assert (done.code, done.err) == (
        2,
        "error: small.safetensors: is compressed; calibrate the checkpoint it was made from\n",
    )
    assert tcompress("calibrate", dense).code == 2
    assert tcompress("calibrate", dense, "--task", "task.py", "-o", "s.json").code == 2


def test_the_help_says_that_code_is_run(tcompress):
    done = tcompress("calibrate", "--help")
    assert "This runs the code in the task file" in done.out
    assert "Example: tcompress calibrate " in done.out
