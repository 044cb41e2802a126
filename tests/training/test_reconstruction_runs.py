"""reconstruct as a run: with labels and without, stopped and killed, in two processes, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tcompress import make_method
from tcompress.errors import TaskError, UsageError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.svd import SVD
from tests.training.tasks import CNN, MLP, ROOT, factors

SETTING = (LowRankSparse(rank=2, density=0.2), torch.int8)
OFTEN = 1e-9  # minutes: after every step
CALIBRATED = MLP.replace("train_batches", "calibration_batches").replace(
    "(images[chosen], labels[chosen])", "images[chosen]"
)
CALIBRATED += "\ndel loss\n"


def test_images_alone_raise_the_score(small, tune, fixtures):
    dense = fixtures / "digits_mlp.safetensors"
    path, method = small(SVD(rank=4)), make_method("reconstruct:end_to_end=0")
    result = tune(path, method, text=CALIBRATED, against=dense)
    assert result.after.scores["accuracy"] > result.before.scores["accuracy"] + 0.02
    assert result.rows[2].loss < result.rows[1].loss
    assert result.method["by"] == "layer"
    again = tune(path, method, text=CALIBRATED, against=dense, out="again.safetensors")
    assert again.output.sha256 == result.output.sha256


def test_of_a_loss_only_the_call_of_the_model_counts(small, tune, fixtures):
    dense, changed = fixtures / "digits_mlp.safetensors", MLP.replace("F.cross_entropy(", "3 - F.cross_entropy(")
    assert changed != MLP
    first, second = (
        tune(small(SVD(rank=4)), make_method("reconstruct"), text=text, against=dense, out=out, epochs=1)
        for text, out in ((MLP, "one.safetensors"), (changed, "other.safetensors"))
    )
    assert factors(first.output.path).keys() == factors(second.output.path).keys()
    for key, value in factors(first.output.path).items():
        assert torch.equal(value, factors(second.output.path)[key])


def test_batches_can_be_chosen(small, tune, fixtures):
    text = MLP + "\ndef calibration_batches(): return [images for images, _ in train_batches()][:2]\n"
    dense, path = fixtures / "digits_mlp.safetensors", small(SVD(rank=4))
    steps = {
        source: tune(
            path, make_method(f"reconstruct:batches={source}"), text=text, against=dense, force=True, epochs=1
        ).steps
        for source in ("auto", "train", "calibration")
    }
    assert steps == {"auto": 5, "train": 5, "calibration": 2}


@pytest.mark.parametrize(
    ("more", "method", "error", "says"),
    [
        ("del train_batches", "", UsageError, "has no function train_batches and none calibration_batches; write: def"),
        ("", ":batches=calibration", UsageError, "has no function calibration_batches; write: def calibration_batches"),
        (
            "del loss",
            "",
            TaskError,
            r"the model does not take what train_batches gives, its inputs where there is no loss\(model",
        ),
        ("def train_batches(): return []", "", TaskError, "train_batches gives no batch"),
        (
            "def loss(model, batch): return batch[0].mean()",
            "",
            TaskError,
            "loss does not call the model that it is given",
        ),
        (
            "",
            ":order=sequential:end_to_end=0.5",
            UsageError,
            r"2 step\(s\) are too few to train 4 parts one",
        ),
        (
            "def calibration_batches(): return [3]",
            ":batches=calibration",
            TaskError,
            "the model does not take what calibration_batches gives: AttributeError",
        ),
    ],
)
def test_a_task_that_does_not_serve_is_one_line_before_the_first_step(more, method, error, says, small, tune, fixtures):
    path, dense = small(SVD(rank=4)), fixtures / "digits_mlp.safetensors"
    with pytest.raises(error, match=says) as caught:
        tune(path, make_method(f"reconstruct{method}"), text=f"{MLP}\n{more}\n", against=dense, steps=2)
    assert "step 1" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_the_dense_model_nothing_begins(small, tune):
    with pytest.raises(UsageError, match="has no teacher for reconstruct; give the dense checkpoint with --teacher"):
        tune(small(SVD(rank=4)), make_method("reconstruct"))


@pytest.mark.parametrize(
    ("options", "die_at"),  # the first call is the one that looks for the order of layers
    [(":end_to_end=0.2", 3), (":order=sequential:end_to_end=0.3", 9)],
)
def test_a_stopped_run_goes_on_to_the_same_bytes(options, die_at, small, tune, fixtures, monkeypatch):
    path, dense = small(*SETTING, source="digits_cnn.safetensors"), fixtures / "digits_cnn.safetensors"
    method = make_method(f"reconstruct{options}")
    whole = tune(path, method, text=CNN, against=dense, out="whole.safetensors")
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", str(die_at))
    with pytest.raises(KeyboardInterrupt):
        tune(path, method, text=CNN, against=dense, save_every=OFTEN)
    monkeypatch.setenv("DIE_AT", "0")
    result = tune(path, method, text=CNN, against=dense, save_every=OFTEN)
    assert f"went on from step {die_at - 2} of a run that was stopped" in result.notes
    assert [row.loss for row in result.rows] == pytest.approx([row.loss for row in whole.rows])
    assert result.output.sha256 == whole.output.sha256


def test_the_command_line_takes_the_dense_model_as_teacher(small, fixtures, tcompress, tmp_path):
    (tmp_path / "task.py").write_text(MLP)
    words = ["finetune", str(small(SVD(rank=4))), "--task", "task.py", "--steps", "4", "--device", "cpu"]
    words += ["--teacher", str(fixtures / "digits_mlp.safetensors"), "-o", "tuned.safetensors"]
    done = tcompress(*words, "--method", "reconstruct:by=hidden:outputs=kl")
    assert done.code == 0, done.err
    assert "4 steps" in done.out
    refused = tcompress(*words, "--method", "finetune")
    assert "--teacher goes with --method distill or reconstruct" in refused.err


@pytest.mark.slow
def test_two_processes_have_the_mean_of_their_gradients(small, fixtures, tmp_path):
    path = small(SVD(rank=4))
    dense, text = fixtures / "digits_mlp.safetensors", CALIBRATED.replace("randperm(640)", "arange(640)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    found = {}
    for processes, size in ((2, 80), (1, 160)):
        (tmp_path / "task.py").write_text(text.replace("split(128)", f"split({size})"))
        out = f"{processes}.safetensors"
        words = ["finetune", str(path), "--task", "task.py", "--epochs", "2", "--device", "cpu", "-o", out]
        words += ["--method", "reconstruct", "--teacher", str(dense), "--threads", "1", "--lr", "1e-5"]
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(processes),
            "-m",
            "tcompress",
        ]
        done = subprocess.run(
            [sys.executable, *launcher, *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found[processes] = factors(tmp_path / out)
    before = factors(path)
    moved = [float((found[1][key] - before[key]).norm()) for key in before]
    apart = [float((found[1][key] - found[2][key]).norm()) for key in before]
    assert min(moved) > 0
    assert sum(apart) < 0.2 * sum(moved)
