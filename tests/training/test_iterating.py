"""iterate: rounds of compressing and training, what they write, and how a stopped one goes on."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tcompress import Settings, load_into, load_state_dict, load_task, make_method, open_checkpoint, plan_for, verify
from tcompress.checkpoint.manifest import read_manifest
from tcompress.errors import LimitError, UsageError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker
from tcompress.report.tuning import tuning_document, tuning_markdown
from tcompress.training.distillation import Distill
from tcompress.training.finetuning import Finetune
from tcompress.training.iterating import Iterate
from tests.training.tasks import CNN, MLP, ROOT

STEPS_OF_EPOCH = 5
OFTEN = 1e-9
# Three rounds, each of which compresses one layer, or two.
METHOD = Iterate(rounds=3, layers=2, weakening=0.6, towards="dense")
STOPPING = (
    MLP
    + """
import os, signal
calls, plain = 0, loss
die_at, how = int(os.environ.get("DIE_AT", "0")), os.environ.get("DIE_HOW", "")

def loss(model, batch):
    global calls
    calls += 1
    if calls == die_at and how == "interrupt":
        raise KeyboardInterrupt
    if calls == die_at and how == "nan":
        return plain(model, batch) * float("nan")
    if calls == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(model, batch)
"""
)
CONVOLUTIONS = """
import torch
from torch import nn

def model():
    return nn.Sequential(
        nn.Conv2d(6, 24, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, padding=1, stride=2, groups=2),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32),
        nn.Conv2d(32, 40, 1),
    )

def train_batches():
    return torch.randn(3, 8, 6, 9, 9)

def loss(model, batch):
    return (model(batch) - 1).square().mean()

def evaluate(model):
    torch.manual_seed(0)
    return -float(loss(model, torch.randn(16, 6, 9, 9)).detach())
"""


@pytest.fixture
def dense(fixtures):
    return fixtures / "digits_mlp.safetensors"


@pytest.fixture
def whole(dense, tune):
    return tune(dense, METHOD, text=STOPPING, epochs=6, out="whole.safetensors").output


def test_rounds_make_the_model_smaller_and_train_it(dense, tune, tmp_path):
    result = tune(dense, METHOD, epochs=6, history=tmp_path / "rows.csv")
    assert [each.number for each in result.rounds] == [1, 2, 3]
    sizes = [each.nbytes for each in result.rounds]
    assert sizes == sorted(sizes, reverse=True)
    assert result.output.nbytes == sizes[-1] < dense.stat().st_size / 2
    ranks = [{name: became for name, (_, became) in each.layers.items()} for each in result.rounds]
    assert [set(each) for each in ranks] == [{"input.weight", "hidden.weight"}] * 3
    assert [each.layers["hidden.weight"] for each in result.rounds] == [
        (None, "svd:rank=61"), ("svd:rank=61", "svd:rank=34"), ("svd:rank=34", "svd:rank=23")
    ]  # fmt: skip
    assert result.rounds[-1].after == result.after.scores
    assert result.after.scores["accuracy"] > result.rounds[-1].before["accuracy"]
    assert result.dense.scores["accuracy"] == pytest.approx(0.9361, abs=1e-3)
    assert verify(open_checkpoint(result.output.path), against=open_checkpoint(dense)).problems == ()
    assert not list(tmp_path.glob(".*"))


def test_rows_go_on_from_round_to_round(dense, tune, tmp_path):
    result = tune(dense, METHOD, epochs=7, history=tmp_path / "rows.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "rows.csv").read_text())))
    assert [(row["round"], row["epoch"]) for row in rows] == [
        ("1", "0"), ("1", "1"), ("1", "2"),
        ("2", "2"), ("2", "3"), ("2", "4"),
        ("3", "4"), ("3", "5"), ("3", "6"), ("3", "7"),
    ]  # fmt: skip
    assert [int(row["step"]) for row in rows] == [STEPS_OF_EPOCH * int(row["epoch"]) for row in rows]
    assert {row["bytes"] for row in rows if row["round"] == "2"} == {str(result.rounds[1].nbytes_before)}
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert result.steps == 7 * STEPS_OF_EPOCH
    assert 4 <= result.best_epoch <= 7
    document = tuning_document(result)
    assert json.loads(json.dumps(document))["rounds"][0]["layers"]["input.weight"][0] is None
    assert "hidden.weight svd:rank=34" in tuning_markdown(document)
    assert "in 7 epoch" in tuning_markdown(document)


def test_a_method_without_rounds_has_none_in_its_rows(small, tune, tmp_path):
    result = tune(small(SVD(rank=4)), history=tmp_path / "rows.json")
    assert "rounds" not in tuning_document(result)
    assert "round" not in json.loads((tmp_path / "rows.json").read_text())[0]


@pytest.mark.parametrize(
    ("die_at", "save_every"),
    [(1, OFTEN), (2 * STEPS_OF_EPOCH + 1, OFTEN), (3 * STEPS_OF_EPOCH + 3, 10.0), (6 * STEPS_OF_EPOCH, OFTEN)],
)
def test_a_stopped_run_goes_on_in_its_round_to_the_same_bytes(
    die_at, save_every, dense, tune, whole, tmp_path, monkeypatch
):
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", str(die_at))
    with pytest.raises(KeyboardInterrupt):
        tune(dense, METHOD, text=STOPPING, epochs=6, save_every=save_every)
    assert not (tmp_path / "tuned.safetensors").exists()
    monkeypatch.setenv("DIE_AT", "0")
    result = tune(dense, METHOD, text=STOPPING, epochs=6, save_every=save_every)
    assert result.output.sha256 == whole.sha256
    assert [row.epoch for row in result.rows] == [0, 1, 2, 2, 3, 4, 4, 5, 6]
    assert not [note for note in result.notes if "thrown away" in note]
    assert not list(tmp_path.glob(".*"))


def test_a_run_killed_in_the_second_round_goes_on_to_the_same_bytes(dense, whole, tcompress, tmp_path):
    (tmp_path / "task.py").write_text(STOPPING)
    said = "iterate:rounds=3:layers=2:weakening=0.6:towards=dense"
    words = ["finetune", str(dense), "--task", "task.py", "--method", said, "--epochs", "6", "--device", "cpu"]
    words += ["--save-every", str(OFTEN)]
    program = [sys.executable, "-m", "tcompress", *words, "-o", "killed.safetensors"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIE_AT": "14"}
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed.safetensors").exists()
    again = tcompress(*words, "-o", "killed.safetensors")
    assert again.code == 0, again.err
    assert "round 2: went on from step 3 of a run that was stopped" in again.out
    assert (tmp_path / "killed.safetensors").read_bytes() == whole.path.read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("where", ["rounds.recompress", "round_files.write_whole", "rounds.RoundFiles.hand_over"])
def test_a_run_stopped_between_rounds_goes_on_to_the_same_bytes(where, dense, tune, whole, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"tcompress.training.{where}", stopped)
        with pytest.raises(KeyboardInterrupt):
            tune(dense, METHOD, text=STOPPING, epochs=6)
    assert tune(dense, METHOD, text=STOPPING, epochs=6).output.sha256 == whole.sha256


def test_rounds_of_another_run_are_not_taken(dense, tune, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("DIE_HOW", "interrupt")
    monkeypatch.setenv("DIE_AT", str(3 * STEPS_OF_EPOCH))
    with pytest.raises(KeyboardInterrupt):
        tune(dense, METHOD, text=STOPPING, epochs=6, seed=1)
    monkeypatch.setenv("DIE_AT", "0")
    workspace = tmp_path / ".tuned.safetensors.partial"
    (workspace / "rounds-x").symlink_to(tmp_path)
    result = tune(dense, METHOD, text=STOPPING, epochs=6)
    assert "what an unfinished run with other settings had left was thrown away" in result.notes
    assert result.output.sha256 == whole.sha256
    assert (tmp_path / "whole.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_with_the_round_before(dense, tune, monkeypatch):
    monkeypatch.setenv("DIE_HOW", "nan")
    monkeypatch.setenv("DIE_AT", str(2 * STEPS_OF_EPOCH + 1))
    result = tune(dense, METHOD, text=STOPPING, epochs=6)
    assert len(result.rounds) == 1
    assert result.problem.startswith("round 2: ")
    assert "nothing was written" not in result.problem
    assert result.output.nbytes == result.rounds[0].nbytes


def test_convolutions_in_groups_and_with_dilation_stay_what_they_are(tune, tmp_path):
    (tmp_path / "task.py").write_text(CONVOLUTIONS)
    torch.manual_seed(0)
    task = load_task(str(tmp_path / "task.py"), ("model", "evaluate"))
    network = task.model()
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Conv2d):  # something that stands out from noise
                layer.weight += torch.randn(len(layer.weight), 1, 1, 1) * torch.randn_like(layer.weight[:1])
    save_file(network.state_dict(), tmp_path / "dense.safetensors")
    plan = plan_for(Tucker(rank=4))
    result = tune(tmp_path / "dense.safetensors", Iterate(rounds=2), text=CONVOLUTIONS, plan=plan, epochs=2)
    assert {name for each in result.rounds for name in each.layers} >= {"0.weight", "2.weight"}
    by_factors, by_weights = load_into(task.model(), result.output.path), task.model()
    load_state_dict(result.output.path, by_weights)
    x = torch.randn(2, 6, 9, 9)
    torch.testing.assert_close(by_factors(x), by_weights(x), atol=1e-4, rtol=1e-4)
    assert task.evaluate(by_weights.eval())["score"] == pytest.approx(result.after.scores["score"], abs=1e-4)


def test_the_usual_plan_knows_kinds_of_layers(tune, fixtures):
    result = tune(fixtures / "digits_cnn.safetensors", Iterate(rounds=1), text=CNN, epochs=1)
    assert result.rounds[0].layers == {
        "conv2.weight": (None, "tucker:ranks=32,8"), "pointwise.weight": (None, "svd:rank=12")
    }  # fmt: skip


def test_layers_are_chosen_by_names_and_by_plans(dense, tune, tcompress, tmp_path):
    (tmp_path / "task.py").write_text(MLP)
    words = ["finetune", str(dense), "--task", "task.py", "--method", "iterate:rounds=1", "--epochs", "1"]
    chosen = tcompress(*words, "--exclude", "hidden*", "-o", "a.safetensors")
    assert chosen.code == 0, chosen.err
    assert set(read_manifest(open_checkpoint(tmp_path / "a.safetensors")).layers) == {"input.weight", "output.weight"}
    missing = tcompress(*words, "--include", "nothing", "-o", "b.safetensors")
    assert missing.code == 2
    assert "no layer is called nothing" in missing.err
    result = tune(dense, Iterate(rounds=1, weakening=1.0), plan=plan_for(SVD(rank=40)), epochs=1)
    assert {became for _, became in result.rounds[0].layers.values()} == {"svd:rank=40"}


def test_bytes_end_rounds_and_that_is_said(dense, tune):
    result = tune(dense, Iterate(rounds=3, keep=0.78), epochs=6)
    assert len(result.rounds) == 1
    assert "ended after round 1 of 3: keep=0.78 is reached" in result.notes
    assert list(result.rounds[0].layers) == ["hidden.weight"], "the other is not needed"
    short = tune(dense, Iterate(rounds=1, keep=0.1), epochs=1, out="short.safetensors")
    (note,) = [note for note in short.notes if "keep" in note]
    part = short.output.nbytes / dense.stat().st_size
    assert note == f"keep=0.1 is not reached, {part:.3f} of the bytes are left; more rounds may"


def test_ranks_that_come_down_no_more_end_rounds(dense, tune):
    result = tune(dense, Iterate(rounds=4), epochs=4, plan=plan_for(SVD(rank=60)))
    assert "ended after round 1 of 4: no layer's rank comes down any more" in result.notes


def test_steps_and_hours_are_those_of_all_rounds(dense, tune):
    result = tune(dense, METHOD, epochs=6, steps=2 * STEPS_OF_EPOCH + 2)
    assert [row.step for row in result.rows][-1] == result.steps == 2 * STEPS_OF_EPOCH + 2
    assert "ended after round 2 of 3: its steps or hours are used up" in result.notes
    quick = tune(dense, METHOD, epochs=6, max_hours=1e-9, out="quick.safetensors")
    assert quick.steps == 1


def test_codes_teachers_and_folders_do_as_well(dense, tune, fixtures):
    coded = tune(dense, make_method("iterate:by=distill:rounds=2"), epochs=2, settings=Settings(store=torch.int8))
    assert coded.method["by"] == "distill"
    assert coded.output.nbytes < tune(dense, Iterate(rounds=2), epochs=2, out="wide.safetensors").output.nbytes
    folder = tune(fixtures / "digits_mlp_sharded", METHOD, epochs=3, out="folder")
    assert len(folder.rounds) == 3
    original = open_checkpoint(fixtures / "digits_mlp_sharded")
    assert verify(open_checkpoint(folder.output.path), against=original).problems == ()


def test_what_trains_has_its_own_options(dense, tune, tcompress, tmp_path):
    assert Iterate(by="distill").trainer == Distill()
    assert make_method("iterate:by=distill:temperature=2:alpha=0.5").trainer == Distill(alpha=0.5, temperature=2)
    assert make_method("iterate:through_codes=false").trainer == Finetune(through_codes=False)
    written = set()
    for alpha in ("0.9", "0.5"):
        method = make_method(f"iterate:by=distill:rounds=2:alpha={alpha}")
        written.add(tune(dense, method, epochs=2, out=f"{alpha}.safetensors").output.sha256)
    assert len(written) == 2
    words = ["finetune", str(dense), "--task", "task.py", "--method", "iterate:by=distill:rounds=2", "--epochs", "2"]
    said = tcompress(*words, "--alpha", "0.5", "--device", "cpu", "-o", "said.safetensors")
    assert said.code == 0, said.err
    assert (tmp_path / "said.safetensors").read_bytes() == (tmp_path / "0.5.safetensors").read_bytes()


def test_nothing_to_compress_is_one_line_and_nothing_is_left(tune, tcompress, tmp_path):
    torch.manual_seed(0)
    noise = nn.Linear(40, 40, bias=False)
    nn.init.normal_(noise.weight)
    save_file(nn.Sequential(noise).state_dict(), tmp_path / "noise.safetensors")
    text = "import torch\ndef model(): return torch.nn.Sequential(torch.nn.Linear(40, 40, bias=False))\n"
    text += "def train_batches(): return torch.randn(2, 4, 40)\ndef evaluate(model): return 0.0\n"
    text += "def loss(model, batch): return model(batch).square().mean()\n"
    with pytest.raises(LimitError, match=r"noise.safetensors: nothing to compress: EVBMF leaves no layer a rank"):
        tune(tmp_path / "noise.safetensors", Iterate(), text=text, epochs=3)
    words = ["finetune", str(tmp_path / "noise.safetensors"), "--task", "task.py", "--method", "iterate"]
    assert tcompress(*words, "-o", "tuned.safetensors").code == 3
    assert {each.name for each in tmp_path.iterdir()} <= {"noise.safetensors", "task.py", "__pycache__"}


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ("iterate:rounds=0", "rounds must be a whole number of at least 1, got 0"),
        ("iterate:layers=few", "layers must be a whole number of at least 1, got 'few'"),
        ("iterate:weakening=0", "weakening must be above 0 and at most 1, got 0"),
        ("iterate:keep=2", "keep must be a fraction above 0 and below 1, got 2"),
        ("iterate:by=prune", "by: 'prune' is none of finetune, distill"),
        ("iterate:temperature=2", "--method iterate:by=finetune: has no option temperature; it has through_codes"),
        ("iterate:by=distill:alpha=few", "--method iterate:by=distill: alpha is as 0.9, got 'few'"),
        ("iterate:by=distill:temperature=0", "--temperature must be above 0, got 0"),
        ("iterate:by=distill:through_codes=1", "--method iterate:by=distill: through_codes is as True, got 1"),
        ("iterate:order=together", "--method iterate: has no option order; it has rounds, weakening, .*, kl_direction"),
        ("iterate:towards=zero", "towards: 'zero' is none of core, dense"),
    ],
)
def test_senseless_options_are_one_line(said, says):
    with pytest.raises(UsageError, match=says):
        make_method(said)


def test_what_cannot_be_begun_is_one_line(dense, small, tune, tmp_path):
    with pytest.raises(UsageError, match=r"2 epoch\(s\) are too few for 3 rounds; give more --epochs"):
        tune(dense, Iterate(rounds=3), epochs=2)
    with pytest.raises(UsageError, match=r"step by step in svd and tucker, and .* is to be sparse"):
        tune(dense, Iterate(), plan=plan_for(Sparse(density=0.5)), epochs=3)
    with pytest.raises(UsageError, match="is compressed already; --method iterate starts from the dense checkpoint"):
        tune(small(SVD(rank=4)), Iterate(), epochs=3)
    assert not list(tmp_path.glob(".*"))
