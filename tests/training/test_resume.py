"""A training run that is stopped or killed goes on where it was, and ends with the bytes of one that never was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tcompress import load_task
from tcompress.errors import TaskError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.svd import SVD
from tests.training.tasks import CNN, ROOT, UNCOUNTED

SETTING = (LowRankSparse(rank=2, density=0.2), torch.int8)
STEPS_OF_EPOCH = 5
OFTEN = 1e-9  # minutes: after every step


@pytest.fixture
def path(small):
    return small(*SETTING, source="digits_cnn.safetensors")


@pytest.fixture
def undisturbed(path, tune):
    return tune(path, text=CNN, out="whole.safetensors").output


@pytest.mark.parametrize("die_at", [2, 4, STEPS_OF_EPOCH + 1, 2 * STEPS_OF_EPOCH])
@pytest.mark.parametrize("save_every", [OFTEN, 10.0], ids=["each step", "each epoch"])
def test_a_stopped_run_goes_on_to_the_same_bytes(die_at, save_every, path, undisturbed, tune, tmp_path, monkeypatch):
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", str(die_at))
    with pytest.raises(KeyboardInterrupt):
        tune(path, text=CNN, save_every=save_every)
    assert not (tmp_path / "tuned.safetensors").exists()
    monkeypatch.setenv("DIE_AT", "0")
    result = tune(path, text=CNN, save_every=save_every)
    last = die_at - 1 if save_every == OFTEN else (die_at - 1) // STEPS_OF_EPOCH * STEPS_OF_EPOCH
    noted = f"went on from step {last} of a run that was stopped"
    assert (noted in result.notes) == (last > 0)
    assert result.output.sha256 == undisturbed.sha256
    assert [row.epoch for row in result.rows] == [0, 1, 2]
    assert not list(tmp_path.glob(".*"))


def test_a_killed_process_goes_on_to_the_same_bytes(path, tcompress, tmp_path):
    (tmp_path / "task.py").write_text(CNN)
    words = ["finetune", str(path), "--task", "task.py", "--epochs", "2", "--device", "cpu", "--save-every", str(OFTEN)]
    program = [sys.executable, "-m", "tcompress", *words, "-o", "killed.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIE_AT": "8"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert {each.name for each in tmp_path.glob("*killed*")} == {
        ".killed.safetensors.partial", "killed.safetensors.history.csv",
    }  # fmt: skip
    again = tcompress(*words, "-o", "killed.safetensors")
    assert again.code == 0, again.err
    assert "went on from step 7 of a run that was stopped" in again.out
    assert tcompress(*words, "-o", "whole.safetensors").code == 0
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_the_state_of_another_run_is_thrown_away_and_that_is_said(path, tune, monkeypatch):
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", "4")
    with pytest.raises(KeyboardInterrupt):
        tune(path, text=CNN, save_every=OFTEN)
    monkeypatch.setenv("DIE_AT", "0")
    result = tune(path, text=CNN, seed=1)
    assert "what an unfinished run with other settings had left was thrown away" in result.notes
    assert result.steps == 2 * STEPS_OF_EPOCH


def test_a_state_that_was_cut_short_or_planted_is_not_taken(path, undisturbed, tune, tmp_path, monkeypatch):
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", "4")
    with pytest.raises(KeyboardInterrupt):
        tune(path, text=CNN, save_every=OFTEN)
    state = tmp_path / ".tuned.safetensors.partial" / "state"
    state.write_bytes(state.read_bytes()[:1000])
    monkeypatch.setenv("DIE_AT", "0")
    assert tune(path, text=CNN, save_every=OFTEN).output.sha256 == undisturbed.sha256


def test_a_normalisation_without_a_count_of_batches_goes_on_too(small, tune, tmp_path, monkeypatch):
    (tmp_path / "task.py").write_text(UNCOUNTED)
    save_file(load_task(str(tmp_path / "task.py"), ("model",)).model().state_dict(), tmp_path / "dense.safetensors")
    path = small(SVD(rank=4), source=tmp_path / "dense.safetensors")
    monkeypatch.setenv("DIE_HOW", "interrupt")
    with pytest.raises(KeyboardInterrupt):
        tune(path, text=UNCOUNTED, epochs=None, steps=8, save_every=OFTEN)
    monkeypatch.setenv("DIE_HOW", "")
    result = tune(path, text=UNCOUNTED, epochs=None, steps=8, save_every=OFTEN)
    assert "went on from step 4 of a run that was stopped" in result.notes
    assert result.steps == 8


def test_an_error_after_hours_leaves_the_state(path, tune, tmp_path, monkeypatch):
    text = CNN + "\nfine = evaluate\nscored = 0\n"
    text += "def evaluate(model):\n    global scored\n    scored += 1\n"
    text += "    if scored == 3 and how == 'disk':\n        raise OSError('the disk is gone')\n    return fine(model)\n"
    whole = tune(path, text=text, out="other.safetensors").output
    monkeypatch.setenv("DIE_HOW", "disk")
    with pytest.raises(TaskError, match="the disk is gone"):
        tune(path, text=text)
    monkeypatch.setenv("DIE_HOW", "")
    result = tune(path, text=text)
    assert "went on from step 5 of a run that was stopped" in result.notes
    assert result.output.sha256 == whole.sha256
    assert not Path(tmp_path / ".tuned.safetensors.partial").exists()


@pytest.mark.slow
def test_two_processes_take_turns_and_go_on_to_the_same_bytes_too(path, tmp_path):
    (tmp_path / "task.py").write_text(CNN)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def launch(out: str, **more: str) -> subprocess.CompletedProcess[str]:
        words = ["finetune", str(path), "--task", "task.py", "--epochs", "3", "--device", "cpu", "-o", out]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "tcompress"]
        program = [sys.executable, *launcher, *words, "--save-every", str(OFTEN), "--threads", "1"]
        known = {**environment, **more}
        return subprocess.run(program, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)

    assert launch("killed.safetensors", DIE_AT="4").returncode != 0
    again = launch("killed.safetensors")
    assert "went on from step 3 of a run that was stopped" in again.stdout, again.stderr
    assert "6 steps in 3 epoch(s) on cpu:0 in 2 processes" in launch("whole.safetensors").stdout
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
