"""A run that is killed at any moment leaves the old state or the new one, and the same command goes on from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent.parent
TRIALS = Path(__file__).parent / "trials.py"
FORMAT = ["--format", "lrs:rounds=15", "--keep", "0.4"]


def model(path: Path, layers: int = 10) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{n}.weight": torch.randn(192, 160, generator=generator) for n in range(layers)}
    save_file({**tensors, "bias": torch.zeros(7)}, path)
    return path


def trials(source: Path, folder: Path, count: int, *flags: str, options: list[str] = FORMAT) -> list[dict]:
    command = [sys.executable, str(TRIALS), str(source), str(folder), str(count), "7", *flags, "--", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict], allowed: set[str | None]) -> None:
    for trial in found:
        assert trial["code"] == 0, trial
        assert trial["same"], trial
        assert trial["left"] == [], trial
        assert set(trial["states"]) <= allowed, trial
    assert any(trial["went_on"] for trial in found), "some kill came after some layer"


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    check(trials(model(tmp_path / "m.safetensors"), tmp_path, 10), {"old", "new"})


@pytest.mark.slow
def test_fifty_killed_runs_go_on_to_the_same_bytes(tmp_path):
    check(trials(model(tmp_path / "m.safetensors"), tmp_path, 50), {"old", "new"})


@pytest.mark.slow
def test_what_is_replaced_is_there_until_the_new_one_is(tmp_path):
    check(trials(model(tmp_path / "m.safetensors"), tmp_path, 50, "--force"), {"old", "new"})


def test_shards_and_searched_settings_go_on_too(tmp_path):
    source = tmp_path / "folder"
    source.mkdir()
    model(source / "model.safetensors", layers=6)
    (source / "config.json").write_text("{}")
    options = ["--format", "lrs:share=auto:rounds=8", "--keep", "0.4", "--max-shard-size", "100KB"]
    check(trials(source, tmp_path, 4, options=options), {"old", "new"})
