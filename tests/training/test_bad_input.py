"""What cannot be trained is one line, before the first step where that can be known."""

from __future__ import annotations

import builtins
import importlib
import sys

import pytest
import torch

from tcompress import TrainingOptions
from tcompress.errors import InputError, NumericalError, OutputError, SafetyError, TaskError, UsageError
from tcompress.formats.svd import SVD
from tests.training.tasks import MLP, factors

LOSS = "def loss(model, batch):\n    "
DETACHED = "logits = model(batch[0]).detach() * model.output.bias\n    return F.cross_entropy(logits, batch[1])"


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        (f"{LOSS}return torch.zeros(())", TaskError, "task.py: loss has no gradient: no gradient reaches any factor"),
        (f"{LOSS}{DETACHED}", TaskError, "task.py: loss does not touch the compressed layers: no gradient reaches"),
        (f"{LOSS}return model(batch[0])", TaskError, r"loss gives Tensor of shape \(128, 10\); it must give "),
        (
            "def train_batches(): return [3]",
            TaskError,
            r"task.py:17: step 1 \(epoch 1\), with a batch of train_batches: TypeError: cannot unpack",
        ),
        ("def train_batches(): return []", TaskError, "task.py: train_batches gives no batch"),
        ("def train_batches(): return 3", TaskError, "train_batches gives int; it must give something to iterate over"),
        (
            "calls = iter([[(torch.rand(2, 1, 8, 8), torch.zeros(2).long())], [], []])\n"
            "class Once:\n    def __len__(self): return 1\n    def __iter__(self): return iter(next(calls))\n"
            "def train_batches(): return Once()",
            TaskError,
            "epoch 2: train_batches gives too few batches; it must give all, each time",
        ),
        (
            f"{LOSS}raise torch.OutOfMemoryError('CUDA out of memory')",
            SafetyError,
            r"step 1 \(epoch 1\): not enough memory for a batch of 128; make the batches of train_batches smaller",
        ),
        (
            f"{LOSS}raise RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory: 7 bytes')",
            SafetyError,
            "not enough memory for a batch of 128",
        ),
        ("def evaluate(model): raise KeyError('x')", TaskError, "KeyError: 'x'"),
        ("def optimizer(parameters): return 3", TaskError, "optimizer gives int; it must give a torch.optim.Optimizer"),
        (
            "def scheduler(optimizer): return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)",
            TaskError,
            "scheduler gives ReduceLROnPlateau; it must give a torch.optim.lr_scheduler.LRScheduler that",
        ),
        ("def model(): return torch.nn.Linear(2, 2)", InputError, "small.safetensors: does not fit the model Linear"),
        ("def model(): return DigitsMLP().requires_grad_(False)", UsageError, "has no compressed layer that learns"),
    ],
)  # fmt: skip
def test_a_task_that_does_not_serve_is_one_line_and_nothing_is_left(more, error, says, small, tune, tmp_path):
    with pytest.raises(error, match=says):
        tune(small(SVD(rank=4)), text=f"{MLP}\n{more}\n")
    left = {each.name for each in tmp_path.iterdir()} - {"task.py", "small.safetensors", "__pycache__"}
    assert left <= {".tuned.safetensors.partial"}
    assert ("epoch 2" in says) == (left != set()), "only a state is worth keeping"


def test_a_codes_layer_that_the_task_freezes_does_not_learn(small, tune):
    text = MLP.replace(
        "return DigitsMLP()", "made = DigitsMLP()\n    made.input.requires_grad_(False)\n    return made"
    )
    path = small(SVD(rank=4), torch.int8)
    result = tune(path, text=text)
    before, after = factors(path), factors(result.output.path)
    changed = {layer for layer, name in before if not torch.equal(before[layer, name], after[layer, name])}
    assert changed == {"hidden.weight", "output.weight"}


def test_a_half_precision_layer_that_the_task_freezes_keeps_its_type_and_values(small, tune):
    text = MLP.replace(
        "return DigitsMLP()", "made = DigitsMLP()\n    made.input.requires_grad_(False)\n    return made"
    )
    path = small(SVD(rank=4), source="digits_mlp_bf16.safetensors")
    before, after = factors(path), factors(tune(path, text=text).output.path)
    assert {held.dtype for held in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[key], after[key]) == (key[0] == "input.weight") for key in before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"lr": -1.0}, "--lr must be above 0, got -1"),
        ({"max_hours": float("nan")}, "--max-hours must be above 0, got nan"),
        ({"precision": "fp8"}, "--precision: 'fp8' is none of fp32, bf16"),
    ],
)
def test_senseless_options_are_refused(options, says):
    with pytest.raises(UsageError, match=says):
        TrainingOptions(**options)


def test_a_rate_beside_the_tasks_optimizer_is_refused(small, tune):
    text = f"{MLP}\ndef optimizer(parameters): return torch.optim.SGD(parameters, lr=0.1)\n"
    with pytest.raises(UsageError, match=r"its optimizer\(parameters\) says the learning rate; leave out --lr"):
        tune(small(SVD(rank=4)), text=text, lr=0.1)


def test_dense_checkpoints_and_outputs_that_exist_are_refused(small, tune, fixtures, tmp_path):
    dense = fixtures / "digits_mlp.safetensors"
    with pytest.raises(UsageError, match="is not a compressed checkpoint; make one with `tcompress compress`"):
        tune(dense)
    path = small(SVD(rank=4))
    with pytest.raises(UsageError, match="is compressed itself; give the checkpoint it was made from"):
        tune(path, against=path)
    with pytest.raises(UsageError, match=r"end the name with \.safetensors"):
        tune(path, out="tuned.pt")
    (tmp_path / "tuned.safetensors").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        tune(path)
    with pytest.raises(OutputError, match="is the input itself"):
        tune(path, out="small.safetensors", force=True)


def test_batches_without_end_need_a_number_of_steps(small, tune, monkeypatch):
    monkeypatch.setattr("tcompress.training.batches._MOST_COUNTED", 20)
    text = MLP.replace("return [", "while True: yield from [")
    with pytest.raises(UsageError, match="train_batches gives more than 20 batches; say with --steps how many"):
        tune(small(SVD(rank=4)), text=text)
    assert tune(small(SVD(rank=4)), text=text, epochs=None, steps=7).steps == 7


def test_training_without_accelerate_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("accelerate"):
            raise ImportError("No module named 'accelerate'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "tcompress.training.engine")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"training needs accelerate .*: pip install 'tcompress\[train\]'"):
        importlib.import_module("tcompress.training.engine")


@pytest.mark.parametrize("what", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launcher_that_shares_the_model_out_is_refused_before_anything_is_loaded(
    what, small, tune, tmp_path, monkeypatch
):
    path, text = small(SVD(rank=4)), MLP + "\ndef model():\n    raise RuntimeError('it has begun')\n"
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "false")
    with pytest.raises(TaskError, match="it has begun"):
        tune(path, text=text)
    monkeypatch.setenv(f"ACCELERATE_USE_{what}", "true")
    with pytest.raises(UsageError, match=r"set up for .*, and factors are not trained in shards; .* --multi_gpu"):
        tune(path, text=text)
    assert not list(tmp_path.glob(".*"))


LOST = (
    "scored = 0\nfine = loss\ndef loss(model, batch): return fine(model, batch) * (float('nan') if scored > 1 else 1)\n"
)
WORSE = "def evaluate(model):\n    global scored\n    scored += 1\n    return {'score': -float(scored)}\n"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (f"{LOSS}return model(batch[0])", TaskError),
        (LOST + WORSE, NumericalError),  # after an epoch, whose state is of no use then
    ],
)
@pytest.mark.parametrize("before", [None, "of an earlier run\n"])
def test_a_run_that_leaves_nothing_to_go_on_from_leaves_no_history(before, more, error, small, tune, tmp_path):
    history = tmp_path / "tuned.safetensors.history.csv"
    if before is not None:
        history.write_text(before)
    with pytest.raises(error):
        tune(small(SVD(rank=4)), text=f"{MLP}\n{more}\n", history=history)
    assert not (tmp_path / ".tuned.safetensors.partial").exists()
    assert (history.read_text() if history.exists() else None) == before


def test_a_run_that_can_go_on_keeps_its_history(small, tune, tmp_path):
    history, flag = tmp_path / "tuned.safetensors.history.csv", tmp_path / "fail"
    text = f"{MLP}\nfrom pathlib import Path\nfine, scored = evaluate, 0\n"
    text += "def evaluate(model):\n    global scored\n    scored += 1\n"
    text += f"    if scored == 3 and Path({str(flag)!r}).exists(): raise OSError('gone')\n    return fine(model)\n"
    flag.touch()
    with pytest.raises(TaskError, match="gone"):
        tune(small(SVD(rank=4)), text=text, history=history)
    assert len(history.read_text().splitlines()) == 3  # a head, the model before, and one epoch
    flag.unlink()
    result = tune(tmp_path / "small.safetensors", text=text, history=history)
    assert len(history.read_text().splitlines()) == 1 + len(result.rows) == 4
