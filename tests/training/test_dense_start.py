"""Methods that begin with a dense checkpoint and a plan: what the engine does for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

import tcompress as package
from tcompress import compress, plan_for, verify
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import LimitError, UsageError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.svd import SVD
from tcompress.runtime.install import collect
from tcompress.training.finetuning import TaskLoss
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults
from tcompress.workflow.plan import Target
from tests.training.tasks import MLP

PLAN = plan_for(SVD(rank=4))


class LateLoss(TaskLoss):
    """May be written from its second epoch on, and notes what it is told."""

    told: ClassVar[list[tuple]] = []

    def begin_epoch(self, epoch: int, *, anew: bool) -> None:
        self.told.append(("begin", epoch, anew))

    def end_epoch(self, epoch: int) -> None:
        self.told.append(("end", epoch))

    def may_be_written(self, epoch: int) -> bool:
        return epoch >= 2


@dataclass(frozen=True)
class Late(Method):
    name: ClassVar[str] = "late"
    summary: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    defaults: ClassVar[Defaults] = Defaults(epochs=3, lr=1e-3)
    starts_dense: ClassVar[bool] = True
    by_epochs: ClassVar[bool] = True

    def prepare(self, setup, dense) -> None:
        assert collect(setup.model)
        assert not collect(dense)
        assert all(not each.requires_grad for each in dense.parameters())

    def objective(self, setup: Setup) -> Objective:
        LateLoss.told.clear()
        return LateLoss(setup.task)


@pytest.fixture
def late(from_dense):
    run = from_dense(Late, epochs=3, out="late.safetensors")
    return lambda plan=PLAN, **rest: run(plan, **rest)


def test_the_plan_is_carried_out_and_what_it_makes_is_trained(late, tmp_path, fixtures):
    result = late()
    dense = open_checkpoint(fixtures / "digits_mlp.safetensors")
    assert verify(open_checkpoint(result.output.path), against=dense).problems == ()
    compress(dense, PLAN, out=tmp_path / "small.safetensors")
    assert result.before.nbytes == (tmp_path / "small.safetensors").stat().st_size
    assert result.dense.scores["accuracy"] == pytest.approx(0.9361, abs=1e-3)
    assert result.after.scores["accuracy"] > result.before.scores["accuracy"]
    assert not list(tmp_path.glob(".*"))


def test_epochs_before_what_was_asked_for_are_never_the_best(late):
    result = late()
    assert [row.best for row in result.rows][:3] == [False, False, True]
    assert result.best_epoch >= 2
    said = [(what, epoch, *more) for epoch in (1, 2, 3) for what, more in (("begin", (True,)), ("end", ()))]
    assert LateLoss.told == said


def test_a_run_that_ends_before_says_so_and_goes_on_from_there(late, tmp_path):
    with pytest.raises(LimitError, match="ended at step 1, before the method had made what may be written; give it"):
        late(max_hours=1e-9)
    assert not (tmp_path / "late.safetensors").exists()
    assert "went on from step 1 of a run that was stopped" in late().notes


def test_a_stopped_run_takes_what_it_had_compressed_and_ends_with_the_same_bytes(late, tmp_path, monkeypatch):
    whole = late(out="whole.safetensors").output
    text = MLP + "\nimport os\nplain, calls = loss, 0\ndef loss(model, batch):\n    global calls\n    calls += 1\n"
    text += "    if calls == int(os.environ.get('DIE_AT', '0')):\n        raise KeyboardInterrupt\n"
    text += "    return plain(model, batch)\n"
    for die_at in ("1", "8"):
        monkeypatch.setenv("DIE_AT", die_at)
        with pytest.raises(KeyboardInterrupt):
            late(text=text, save_every=1e-9)
        assert list((tmp_path / ".late.safetensors.partial").glob("start-*"))
    monkeypatch.setenv("DIE_AT", "0")
    monkeypatch.setattr("tcompress.training.starting.compress", None)
    result = late(text=text)
    assert LateLoss.told[0] == ("begin", 2, False)
    assert result.output.sha256 == whole.sha256


def test_the_start_of_another_plan_is_not_taken(late, tmp_path, monkeypatch):
    workspace = tmp_path / ".late.safetensors.partial"
    workspace.mkdir()
    (workspace / "start-0123456789abcdef.safetensors").write_text("of another run")
    (workspace / "start-folder").mkdir()
    (workspace / "start-link").symlink_to(tmp_path)
    found = []

    def watched(*arguments, **named):
        found.extend(path.name for path in workspace.iterdir())
        return compress(*arguments, **named)

    monkeypatch.setattr("tcompress.training.starting.compress", watched)
    assert late().best_epoch >= 2
    assert found == ["lock"]
    assert tmp_path.is_dir()


def test_layers_that_the_plan_could_not_make_smaller_are_named(late):
    found = late(plan_for(Target(LowRankSparse, {"rank": 8}, keep=0.2), exclude=["hidden.*"]))
    notes = [note for note in found.notes if "stays dense" in note]
    assert notes == ["output.weight stays dense: low-rank-sparse:rank=8:keep=0.2 does not make it smaller"]
    assert not any("stays dense" in note for note in late(out="other.safetensors").notes)


@pytest.mark.parametrize(
    ("plan", "options", "says"),
    [
        (None, {}, "digits_mlp.safetensors: --method late needs a plan: give --format or --plan"),
        (plan_for(SVD(rank=4), include=["x"]), {}, "no layer is called x"),
        (PLAN, {"epochs": None, "steps": 3}, "--method late goes by epochs; say --epochs"),
    ],
)
def test_what_cannot_be_begun_is_one_line(plan, options, says, late, tmp_path):
    with pytest.raises(UsageError, match=says):
        late(plan=plan, **options)
    assert {each.name for each in tmp_path.iterdir()} <= {"task.py", "__pycache__"}


def test_compressed_checkpoints_and_plans_for_them_are_refused(late, small):
    path = small(SVD(rank=4))
    with pytest.raises(UsageError, match="is compressed already; --method late starts from the dense checkpoint"):
        late(source=path)
    with pytest.raises(UsageError, match="--method finetune trains what is compressed already; leave out the plan"):
        late(source=path, method=package.make_method("finetune"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "distill:beta=1",
            "--method distill: has no option beta; it has alpha, temperature, kl_direction, through_codes",
        ),
        ("distill:alpha=much", "--method distill: alpha is as 0.9, got 'much'"),
        ("distill:alpha=true", "--method distill: alpha is as 0.9, got True"),
        ("distill:alpha", "--method distill: 'alpha' is no option; write distill:option=value"),
        ("finetune:alpha=1", "--method finetune: has no option alpha; it has through_codes"),
        ("distill:alpha=2", "--alpha must be from 0 to 1, got 2"),
    ],
)
def test_options_behind_a_method_are_checked(text, says):
    with pytest.raises(UsageError, match=says):
        package.make_method(text)


def test_options_behind_a_method_are_its_own():
    assert package.make_method("distill:alpha=0.5", temperature=2.0) == package.make_method(
        "distill", alpha=0.5, temperature=2.0
    )
    with pytest.raises(UsageError, match="--method distill says its alpha already; leave out --alpha"):
        package.make_method("distill:alpha=0.5", alpha=0.5)
