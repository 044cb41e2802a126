"""The smallest plan that scores well enough: on the way there nothing is evaluated twice, whoever stops the search."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, LimitError, TaskError, UsageError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.budgeting import choose
from tcompress.workflow.budgets import Budget
from tcompress.workflow.choices import choices_of
from tcompress.workflow.drop import NEEDS, Trials, plan_within_drop
from tcompress.workflow.evaluations import Evaluations
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import load_task

TASK = """
from pathlib import Path
import torch

CALLS = Path(__file__).with_name("calls")
MOST = Path(__file__).with_name("most")

def inputs(seed):
    return torch.randn(64, 24, generator=torch.Generator().manual_seed(seed))

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))

DENSE = model()(inputs(1)).detach()

def calibration_batches():
    yield inputs(2)

def evaluate(model):
    calls = CALLS.read_text() if CALLS.exists() else ""
    if MOST.exists() and len(calls) >= int(MOST.read_text()):
        raise RuntimeError("stopped")
    CALLS.write_text(calls + "x")
    return {"near": -float((model(inputs(1)) - DENSE).square().mean() / DENSE.square().mean())}
"""

IN_BYTES = Settings(store=torch.int8)  # one type of four: there is less to be fitted


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    save_file(load_task(str(tmp_path / "task.py"), NEEDS).model().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def trials(folder):
    """Return what makes new trials of the same model, as another run of the command would."""
    with open_checkpoint(folder / "model.safetensors") as checkpoint:

        def made(path=None):
            task = load_task(str(folder / "task.py"), NEEDS)
            models = Reconstruction(checkpoint, task)
            choices = choices_of(checkpoint, formats=(SVD, Sparse), settings=IN_BYTES, reconstruction=models)
            return Trials(choices, models, task, IN_BYTES, evaluations=Evaluations(path))

        yield made


def calls(folder):
    return len((folder / "calls").read_text())


def test_the_smallest_budget_that_was_seen_to_do_is_chosen(trials):
    found = plan_within_drop(trials(), 0.05, most=6)
    assert found.search.dense_score == 0
    tried = found.search.evaluated
    good = [each for each in tried if each.drop <= 0.05]
    assert len(tried) == 6
    assert found.stored_bytes == min(each.stored_bytes for each in good)
    assert any(each.drop > 0.05 for each in tried if each.keep > 0.9 * min(each.keep for each in good))
    again = trials()
    assert again.of(found.plan)[0]["near"] == min(good, key=lambda each: each.keep).score
    assert found.budget == {"max_drop": 0.05}
    assert sum(note.startswith("--keep") for note in found.notes) == 6


def test_a_score_does_not_depend_on_what_was_evaluated_before(trials):
    used, fresh = trials(), trials()
    small, smaller = (choose(used.choices, Budget(keep=keep)).plan for keep in (0.3, 0.06))
    used.of(smaller)
    assert used.of(small) == fresh.of(small)


def test_nothing_is_evaluated_again_by_a_run_after_one_that_was_stopped(trials, folder):
    path = folder / "plan.evaluations.json"
    (folder / "most").write_text("3")
    with pytest.raises(TaskError, match="stopped"):
        plan_within_drop(trials(path), 0.05, most=4)
    assert calls(folder) == 3
    (folder / "most").unlink()
    found = plan_within_drop(trials(path), 0.05, most=4)
    known = [each.was_known for each in found.search.evaluated]
    assert known[:3] == [True, True, False]
    assert calls(folder) == 3 + known.count(False)
    assert plan_within_drop(trials(path), 0.05, most=4).plan.to_json() == found.plan.to_json()
    assert calls(folder) == 3 + known.count(False)
    assert sorted(file.name for file in folder.glob("*plan*")) == ["plan.evaluations.json"]


def test_another_task_is_evaluated_for_itself(trials, folder):
    path = folder / "plan.evaluations.json"
    plan_within_drop(trials(path), 1.0, most=1)
    (folder / "task.py").write_text(TASK + "# another\n")
    plan_within_drop(trials(path), 1.0, most=1)
    assert calls(folder) == 4


def test_a_drop_that_no_plan_keeps_is_told_with_the_smallest(trials):
    with pytest.raises(LimitError, match=r"none of 2 plans scores at most 0 below .* the smallest drop is [0-9.e-]+, "):
        plan_within_drop(trials(), 0.0, most=2)
    with pytest.raises(UsageError, match="--max-drop is a number from 0 on"):
        plan_within_drop(trials(), -1.0)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1, "scores": {"a": {"near": "x"}}}', '{"version": 2}'])
def test_a_damaged_record_is_refused_in_a_line(tmp_path, text):
    path = tmp_path / "plan.evaluations.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"is no record of evaluations.*delete it"):
        Evaluations(path)


def test_a_record_says_what_was_measured(tmp_path):
    path = tmp_path / "e.json"
    assert Evaluations(path).scores({"plan": 1}, lambda: {"near": 0.5}) == ({"near": 0.5}, False)
    assert Evaluations(path).scores({"plan": 1}, lambda: {"near": 0.7}) == ({"near": 0.5}, True)
    assert Evaluations(path).scores({"plan": 2}, lambda: {"near": 0.7}) == ({"near": 0.7}, False)
    assert list(json.loads(path.read_text())) == ["version", "scores"]
