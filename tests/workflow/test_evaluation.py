"""evaluate(): two models side by side, and what their processes may do."""

from __future__ import annotations

import os
from textwrap import dedent

import pytest
import torch
from torch import nn

from fixtures.models import accuracy
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, TaskError, UsageError
from tcompress.formats.svd import SVD
from tcompress.workflow.compression import compress
from tcompress.workflow.decoding import view
from tcompress.workflow.evaluation import NEEDS, USES, evaluate
from tcompress.workflow.latency import Inputs, given_inputs, median_milliseconds, read_call, written_call
from tcompress.workflow.loading import load_state_dict
from tcompress.workflow.plan import plan_for
from tcompress.workflow.processes import in_fresh_process
from tcompress.workflow.task import load_task
from tests.conftest import FIXTURES

CPU = torch.device("cpu")
DIGITS = """
import os
import torch
from fixtures.models import DigitsMLP, held_out_images

def model():
    return DigitsMLP()

def evaluate(model):
    images, labels = held_out_images()
    return {"accuracy": int((model(images).argmax(1) == labels).sum()) / len(labels)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def small(folder):
    path = folder / "small.safetensors"
    with open_checkpoint(FIXTURES / "digits_mlp.safetensors") as checkpoint:
        compress(checkpoint, plan_for(SVD(rank=24)), out=path)
    return path


@pytest.fixture
def task_of(tmp_path):
    def load(text, uses=USES):
        (tmp_path / "task.py").write_text(dedent(text))
        return load_task(str(tmp_path / "task.py"), NEEDS, uses)

    return load


def test_scores_bytes_latency_and_memory_stand_side_by_side(small, fixtures, task_of):
    dense = fixtures / "digits_mlp.safetensors"
    text = DIGITS.replace(
        "    return {",
        "    plain = sum(type(m) is torch.nn.Linear for m in model.modules())\n    return {'plain': plain, ",
    )
    with open_checkpoint(small) as checkpoint, open_checkpoint(dense) as original:
        found = evaluate(checkpoint, task_of(text), against=original, cache="never")
    assert (found.dense.name, found.compressed.name) == ("dense", "compressed")
    assert found.dense.scores == {"plain": 3, "accuracy": accuracy(load_state_dict(dense), "digits_mlp")}
    assert found.compressed.scores == {"plain": 1, "accuracy": accuracy(load_state_dict(small), "digits_mlp")}
    assert found.dense.scores["accuracy"] != found.compressed.scores["accuracy"]
    assert (found.dense.nbytes, found.compressed.nbytes) == (dense.stat().st_size, small.stat().st_size)
    for row in (found.dense, found.compressed):
        assert set(row.latency_ms) == {1, 32}
        assert all(0 < median < 100 for median in row.latency_ms.values())
        assert 0 < row.peak_memory_bytes < 200e6
        assert row.peak_gpu_bytes is None
    assert (found.inputs, found.device, found.cache, found.notes) == ("evaluate", "cpu", "never", ())


def test_without_the_original_the_dense_row_is_the_decompressed_one(small, task_of):
    """And memory counts what evaluate takes, neither this process's nor that of imports."""
    held = torch.ones(100_000_000)
    text = DIGITS.replace("def model", "torch.ones(150_000_000)\n\ndef model").replace(
        "    images,", "    torch.ones(50_000_000)\n    images,"
    )
    with open_checkpoint(small) as checkpoint:
        found = evaluate(checkpoint, task_of(text))
        tensors = view(checkpoint).infos.values()
    assert len(held) == 100_000_000
    assert found.dense.name == "decompressed"
    assert found.dense.nbytes == sum(info.nbytes for info in tensors)
    assert found.dense.scores == found.compressed.scores
    assert found.notes[0].startswith("decompressed: the weights are those of the compressed model")
    for row in (found.dense, found.compressed):
        assert 200e6 < row.peak_memory_bytes < 320e6


def test_a_model_that_is_never_called_has_scores_but_no_latency(small, task_of):
    text = DIGITS + "\ndef evaluate(model):\n    return torch.rand(1)\n"
    with open_checkpoint(small) as checkpoint:
        found = evaluate(checkpoint, task_of(text))
    assert found.dense.latency_ms == found.compressed.latency_ms == {}
    assert found.inputs is None
    assert found.notes[1].startswith("latency was not measured: evaluate never called the model")
    assert found.dense.scores == found.compressed.scores, "both begin with the same seed"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("os._exit(3)", "evaluating the decompressed model: the process ended with exit code 3 and no answer"),
        ("os.kill(os.getpid(), 9)", "the process was killed by SIGKILL: there was probably not enough memory"),
        ("return model(torch.ones(2, 3))", "task.py:15: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=["exits", "killed", "raises"],
)
def test_whatever_ends_the_process_is_one_line(small, task_of, body, says):
    task = task_of(f"{DIGITS}\n\ndef evaluate(model):\n    {body}\n")
    with open_checkpoint(small) as checkpoint, pytest.raises(TaskError) as caught:
        evaluate(checkpoint, task)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_errors_keep_their_class_path_and_tensor_on_the_way_from_the_process(small):
    with pytest.raises(InputError) as caught:
        in_fresh_process(_refuse, small, doing="refusing", path=small)
    assert (caught.value.path, caught.value.tensor, caught.value.reason) == (small, "fc.weight", "is wrong")
    assert "_refuse" in str(caught.value.__cause__), "--debug shows where it was raised"


def test_a_large_answer_comes_back_whole(small):
    assert in_fresh_process(bytes, 5_000_000, doing="counting", path=small) == bytes(5_000_000)


def test_what_is_compressed_and_what_is_not_is_told_before_any_code_runs(small, fixtures, task_of):
    dense = fixtures / "digits_mlp.safetensors"
    task = task_of("def model(): raise ValueError\ndef evaluate(model): raise ValueError\n")
    with open_checkpoint(dense) as checkpoint, pytest.raises(UsageError, match="is not a compressed checkpoint; make"):
        evaluate(checkpoint, task)
    with open_checkpoint(small) as one, open_checkpoint(small) as two, pytest.raises(UsageError, match="is compressed"):
        evaluate(one, task, against=two)


def test_inputs_that_the_task_gives_are_tried_before_evaluating(small, task_of):
    task = task_of(DIGITS + "\ndef example_inputs(): return torch.ones(2, 5)\ndef evaluate(model): raise ValueError\n")
    with open_checkpoint(small) as checkpoint, pytest.raises(TaskError) as caught:
        evaluate(checkpoint, task)
    assert "the model does not accept the inputs of example_inputs at batch size 1 (write: def example_inputs()" in str(
        caught.value
    )
    assert "RuntimeError: mat1 and mat2 shapes" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "arguments", "named"),
    [
        ("def example_inputs(): return torch.ones(3)", 1, []),
        ("def example_inputs(): return torch.ones(3), torch.ones(3)", 2, []),
        ("def example_inputs(): return {'a': torch.ones(3)}", 0, ["a"]),
        ("def calibration_batches(): yield {'b': torch.ones(3)}", 0, ["b"]),
        ("def example_inputs(): return torch.ones(3)\ndef calibration_batches(): yield {'b': torch.ones(3)}", 1, []),
    ],
)
def test_a_tensor_is_one_argument_a_tuple_several_and_a_dict_goes_by_name(task_of, text, arguments, named):
    inputs = given_inputs(task_of(f"{DIGITS}\n{text}\n"))
    assert (len(inputs.arguments), list(inputs.named)) == (arguments, named)


def test_inputs_of_another_kind_and_no_batches_are_refused(task_of):
    with pytest.raises(TaskError, match="example_inputs gives str; it must give a tensor, tuple or dict of tensors"):
        given_inputs(task_of(DIGITS + "\ndef example_inputs(): return 'x'\n"))
    with pytest.raises(TaskError, match="calibration_batches gives no batch"):
        given_inputs(task_of(DIGITS + "\ndef calibration_batches(): return []\n"))
    assert given_inputs(task_of(DIGITS)) is None


def test_a_batch_is_cut_or_repeated_and_the_rest_left_alone():
    images, mask = torch.arange(6.0).reshape(3, 2), torch.ones(5)
    inputs = Inputs((images,), {"more": [images, mask], "scale": torch.tensor(2.0), "flag": True}, "x")
    one, many = inputs.at_batch(1, CPU), inputs.at_batch(7, CPU)
    assert torch.equal(one.arguments[0], images[:1])
    assert torch.equal(many.arguments[0], images[[0, 1, 2, 0, 1, 2, 0]])
    assert torch.equal(many.named["more"][0], many.arguments[0])
    assert torch.equal(many.named["more"][1], mask)
    assert (float(many.named["scale"]), many.named["flag"]) == (2.0, True)
    for empty in (Inputs((), {}, "x"), Inputs((torch.tensor(1.0),), {}, "x"), Inputs((torch.empty(0, 3),), {}, "x")):
        with pytest.raises(ValueError, match="hold no tensor whose first dimension is a batch"):
            empty.at_batch(1, CPU)


def test_a_call_goes_through_bytes_unless_it_holds_strange_things():
    call = read_call(written_call((torch.ones(50, 3), None), {"n": 3, "deep": {"x": (torch.ones(50),)}}), "evaluate")
    assert call.arguments[0].shape == (32, 3)
    assert call.arguments[1] is None
    assert call.named["deep"]["x"][0].shape == (32,)
    assert written_call((torch.ones(2), object()), {}) is None
    assert written_call((3,), {}) is None


def test_models_are_called_in_turns(tmp_path):
    calls = []

    class Noting(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            assert torch.is_inference_mode_enabled()
            calls.append((self.name, len(x)))

    inputs = Inputs((torch.ones(4),), {}, "x")
    times = median_milliseconds([Noting("a"), Noting("b")], inputs, device=CPU, path=tmp_path)
    assert [set(each) for each in times] == [{1, 32}, {1, 32}]
    for size in (1, 32):
        timed = [name for name, length in calls if length == size][6:]
        assert timed == ["a", "b"] * (len(timed) // 2)
        assert len(timed) > 20


def _refuse(path):
    assert os.getppid() != 1
    raise InputError("is wrong", path=path, tensor="fc.weight")
