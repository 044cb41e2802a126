"""compress --task with repairs and without, as a person uses it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

TASK = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

def calibration_batches():
    return list((torch.randn(256, 32, generator=torch.Generator().manual_seed(0)) + 1).split(32))
"""


@pytest.fixture
def model(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    torch.manual_seed(0)
    save_file(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).state_dict(), tmp_path / "m.safetensors")
    return "m.safetensors"


def test_repairs_are_made_unless_they_are_not_wanted(tcompress, model):
    asked = ("compress", model, "--format", "sparse:density=0.1", "--task", "task.py")
    done = tcompress(*asked, "-o", "a.safetensors")
    assert (done.code, done.err) == (0, "")
    assert "biases, scales or statistics: on 64 held-out inputs the output is" in done.out
    checked = tcompress("verify", "a.safetensors", "--against", model)
    assert checked.code == 0
    assert "repaired after compression: " in checked.out
    assert "repaired after compression: " in tcompress("inspect", "a.safetensors").out
    plain = tcompress(*asked, "--no-repair", "-o", "b.safetensors", "--json")
    assert json.loads(plain.out)["repairs"] is None
    assert "repaired" not in tcompress("verify", "b.safetensors", "--against", model).out


def test_a_dry_run_with_repairs_tells_a_bound(tcompress, model):
    asked = ("compress", model, "--format", "svd:rank=4", "--task", "task.py", "--dry-run", "--json")
    assert not json.loads(tcompress(*asked).out)["totals"]["exact_bytes"]
    assert json.loads(tcompress(*asked, "--no-repair").out)["totals"]["exact_bytes"]


def test_there_is_nothing_to_leave_out_without_a_task(tcompress, model):
    done = tcompress("compress", model, "--format", "sparse:density=0.1", "--no-repair")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: --no-repair is about what --task repairs; give --task\n"
