"""Equation 8 by hand, and where logits and the teacher come from."""

from __future__ import annotations

import math

import pytest
import torch

from fixtures.models import DigitsMLP
from tcompress import load_task, make_method
from tcompress.errors import TaskError, UsageError
from tcompress.formats.svd import SVD
from tcompress.training.distillation import divergence, logits_in
from tcompress.training.objective import Setup
from tests.training.tasks import MLP

STUDENT, TEACHER = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[0.0, 0.0]])


def test_the_divergence_is_that_of_the_paper_and_the_other_way_round_hintons():
    # At T = 1 the student says 1/4 and 3/4, the teacher 1/2 and 1/2.
    by_hand = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(divergence(STUDENT, TEACHER, 1, "student-teacher")) == pytest.approx(by_hand)
    other = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(divergence(STUDENT, TEACHER, 1, "teacher-student")) == pytest.approx(other)


def test_the_temperature_softens_logits_and_scales_the_divergence():
    hot = divergence(2 * STUDENT, 2 * TEACHER, 2, "student-teacher")
    assert float(hot) == pytest.approx(4 * float(divergence(STUDENT, TEACHER, 1, "student-teacher")))


def test_positions_are_averaged():
    pair = [torch.stack([each, TEACHER]) for each in (STUDENT, TEACHER)]
    once = divergence(STUDENT, TEACHER, 3, "student-teacher")
    assert float(divergence(*pair, 3, "student-teacher")) == pytest.approx(float(once) / 2)


@pytest.mark.parametrize(
    "output", [STUDENT, (STUDENT, 7), {"logits": STUDENT}, type("Output", (), {"logits": STUDENT})()]
)
def test_logits_are_found_in_what_models_return(output):
    assert logits_in(output) is STUDENT


def test_loss_and_divergence_are_added_by_alpha_and_its_rest(tmp_path):
    (tmp_path / "task.py").write_text(MLP)
    task = load_task(str(tmp_path / "task.py"), ("loss",))
    student, teacher = DigitsMLP(), DigitsMLP()
    batch = (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    setup = Setup(task, student, teacher, epochs=1, seed=0)
    with torch.no_grad():
        found = make_method("distill", alpha=0.25, temperature=2).objective(setup).loss(student, batch)
        apart = divergence(student(batch[0]), teacher(batch[0]), 2, "student-teacher")
        assert float(found) == pytest.approx(0.25 * float(task.loss(student, batch)) + 0.75 * float(apart))


def test_distilling_raises_the_score_and_differs_from_the_loss_alone(small, tune, fixtures):
    path, dense = small(SVD(rank=4)), fixtures / "digits_mlp.safetensors"
    distilled = tune(path, make_method("distill"), against=dense)
    assert distilled.after.scores["accuracy"] > distilled.before.scores["accuracy"]
    options = {"alpha": 0.9, "temperature": 3.0, "kl_direction": "student-teacher", "through_codes": True}
    assert distilled.method == {"name": "distill", **options}
    alone = tune(path, make_method("distill", alpha=1.0), against=dense, out="alone.safetensors")
    plain = tune(path, out="plain.safetensors")
    assert alone.output.sha256 != distilled.output.sha256
    assert [row.loss for row in alone.rows] == [row.loss for row in plain.rows]


def test_the_tasks_own_teacher_and_logits_are_taken(small, tune):
    text = f"""{MLP}
seen = []

def teacher():
    torch.manual_seed(0)
    return DigitsMLP()

def logits(model, batch):
    seen.append(type(model).__name__)
    return model(batch[0])

def evaluate(model):
    return float(len(seen))
"""
    result = tune(small(SVD(rank=4)), make_method("distill"), text=text, epochs=1)
    assert result.after.scores["score"] == 10  # student and teacher in each of five steps


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "def loss(model, batch): return model.input.bias.sum()",
            "loss does not call the model that it is given; write",
        ),
        ("def teacher(): return torch.nn.Linear(3, 3)", "the teacher does not take the student's inputs: RuntimeError"),
        (
            "def teacher(): return torch.nn.Flatten()",
            r"logits have other shapes: \(128, 10\) of the student and \(128, 64",
        ),
        ("def teacher(): return 3", "teacher gives int; it must give a torch.nn.Module"),
        ("def logits(model, batch): return 3", "logits gives int; it must give a tensor of floating values"),
    ],
)
def test_what_cannot_be_learnt_from_is_said(more, says, small, tune):
    text = MLP if "teacher" in more else MLP + "\ndef teacher(): return DigitsMLP()\n"
    with pytest.raises(TaskError, match=says):
        tune(small(SVD(rank=4)), make_method("distill"), text=f"{text}\n{more}\n")


@pytest.mark.parametrize(
    "options", [{"alpha": 1.5}, {"alpha": -0.1}, {"temperature": 0.0}, {"kl_direction": "both"}, {"rounds": 3}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(UsageError, match=f"--{next(iter(options)).replace('_', '-')}"):
        make_method("distill", **options)


def test_without_a_teacher_nothing_begins(small, tune, tmp_path):
    with pytest.raises(UsageError, match="has no teacher for distill; give the dense checkpoint with --teacher"):
        tune(small(SVD(rank=4)), make_method("distill"))
    assert not list(tmp_path.glob(".*"))


def test_a_loss_without_gradient_is_told_although_the_teacher_has_one(small, tune, fixtures):
    text = MLP + "\ndef loss(model, batch):\n    model(batch[0])\n    return torch.zeros(())\n"
    with pytest.raises(TaskError, match="loss has no gradient: no gradient reaches any factor"):
        tune(small(SVD(rank=4)), make_method("distill"), text=text, against=fixtures / "digits_mlp.safetensors")
