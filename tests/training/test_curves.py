"""Curves for TensorBoard: each step once, also of a run that was killed, and none where they cannot be written."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from tcompress.errors import OutputError, UsageError
from tcompress.formats.svd import SVD
from tests.training.tasks import CNN, MLP

STEPS_OF_EPOCH = 5


class Writer:
    """A stand-in for torch's SummaryWriter, whose events are lines that reach the disk when they are flushed."""

    fails = False
    is_killed = False

    def __init__(self, folder, purge_step):
        number = sum(1 for _ in Path(folder).iterdir())
        self.file = Path(folder) / f"events.out.tfevents.{number}"
        self.events = [{"purge": purge_step}]
        self.flush()

    def add_scalar(self, tag, value, step):
        self.events.append({"tag": tag, "value": value, "step": step})

    def flush(self):
        if Writer.fails:
            raise OSError(28, "No space left on device")
        self.file.write_text("\n".join(map(json.dumps, self.events)))

    def close(self):
        if not Writer.is_killed:
            self.flush()


@pytest.fixture
def board(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(torch.utils, "tensorboard", module, raising=False)
    monkeypatch.setattr(Writer, "fails", False)
    monkeypatch.setattr(Writer, "is_killed", False)


def shown(folder):
    """Return what TensorBoard would show: of each curve the steps and values, in the order they were written in."""
    curves = {}
    for file in sorted(folder.iterdir()):
        purge, *events = map(json.loads, file.read_text().splitlines())
        for points in curves.values():
            points[:] = [point for point in points if point[0] < purge["purge"]]
        for event in events:
            curves.setdefault(event["tag"], []).append((event["step"], event["value"]))
    return curves


@pytest.mark.usefixtures("board")
def test_losses_of_steps_and_figures_of_epochs_are_curves_over_steps(small, tune, tmp_path):
    result = tune(small(SVD(rank=4)), tensorboard=tmp_path / "a" / "curves")
    curves = shown(tmp_path / "a" / "curves")
    assert curves.keys() == {"loss/step", "loss/epoch", "lr", "score/accuracy"}
    assert [step for step, _ in curves["loss/step"]] == list(range(1, 2 * STEPS_OF_EPOCH + 1))
    losses = [value for _, value in curves["loss/step"]]
    rows = result.rows
    assert curves["loss/epoch"] == [(row.step, row.loss) for row in rows[1:]]
    assert curves["lr"] == [(row.step, row.lr) for row in rows[1:]]
    assert curves["score/accuracy"] == [(row.step, row.scores["accuracy"]) for row in rows]
    assert rows[2].loss == pytest.approx(sum(losses[STEPS_OF_EPOCH:]) / STEPS_OF_EPOCH)


@pytest.mark.usefixtures("board")
@pytest.mark.parametrize("die_at", [4, STEPS_OF_EPOCH + 3])
@pytest.mark.parametrize("save_every", [1e-9, 10.0], ids=["each step", "each epoch"])
def test_a_killed_run_goes_on_in_the_same_folder_and_has_each_step_once(
    die_at, save_every, small, tune, tmp_path, monkeypatch
):
    path = small(SVD(rank=4), source="digits_cnn.safetensors")
    tune(path, text=CNN, out="whole.safetensors", tensorboard=tmp_path / "whole")
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", str(die_at))
    monkeypatch.setattr(Writer, "is_killed", True)
    with pytest.raises(KeyboardInterrupt):
        tune(path, text=CNN, tensorboard=tmp_path / "killed", save_every=save_every)
    monkeypatch.setenv("DIE_AT", "0")
    monkeypatch.setattr(Writer, "is_killed", False)
    tune(path, text=CNN, tensorboard=tmp_path / "killed", save_every=save_every)
    assert shown(tmp_path / "killed") == shown(tmp_path / "whole")


@pytest.mark.usefixtures("board")
def test_a_run_that_goes_on_elsewhere_has_all_epochs_there(small, tune, tmp_path, monkeypatch):
    path = small(SVD(rank=4), source="digits_cnn.safetensors")
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", str(STEPS_OF_EPOCH + 2))
    with pytest.raises(KeyboardInterrupt):
        tune(path, text=CNN, tensorboard=tmp_path / "first")
    monkeypatch.setenv("DIE_AT", "0")
    result = tune(path, text=CNN, tensorboard=tmp_path / "second")
    assert shown(tmp_path / "second")["loss/epoch"] == [(row.step, row.loss) for row in result.rows[1:]]


@pytest.mark.usefixtures("board")
def test_a_new_run_takes_the_place_of_the_one_before(small, tune, tmp_path):
    path = small(SVD(rank=4))
    tune(path, tensorboard=tmp_path / "curves", epochs=3)
    result = tune(path, tensorboard=tmp_path / "curves", epochs=1, force=True, seed=1)
    assert shown(tmp_path / "curves")["lr"] == [(row.step, row.lr) for row in result.rows[1:]]


@pytest.mark.usefixtures("board")
def test_folders_that_cannot_be_written_and_a_package_that_is_not_there_are_said_first(
    small, tune, tmp_path, monkeypatch
):
    path, text = small(SVD(rank=4)), MLP + "\ndef train_batches():\n    raise RuntimeError('it has begun')\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="takes a folder"):
        tune(path, text=text, tensorboard=tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        tune(path, text=text, tensorboard=tmp_path / "file" / "below")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match=r"pip install 'tcompress\[tensorboard\]'"):
        tune(path, text=text, tensorboard=tmp_path / "curves")
    assert not (tmp_path / "curves").exists()


@pytest.mark.usefixtures("board")
def test_a_disk_that_is_full_is_one_line(small, tune, tmp_path, monkeypatch):
    monkeypatch.setattr(Writer, "fails", True)
    with pytest.raises(OutputError, match="No space left on device"):
        tune(small(SVD(rank=4)), tensorboard=tmp_path / "curves")


def test_tensorboard_itself_reads_them(small, tune, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = tune(small(SVD(rank=4)), tensorboard=tmp_path / "curves")
    tune(small(SVD(rank=4)), tensorboard=tmp_path / "curves", force=True)
    found = accumulator.EventAccumulator(str(tmp_path / "curves"))
    found.Reload()
    points = [(point.step, point.value) for point in found.Scalars("loss/epoch")]
    assert points == [(row.step, pytest.approx(row.loss, rel=1e-6)) for row in result.rows[1:]]
    assert [point.step for point in found.Scalars("loss/step")] == list(range(1, 2 * STEPS_OF_EPOCH + 1))
