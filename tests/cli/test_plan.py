"""tcompress plan, and compress without a format, as a person uses them."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tcompress.workflow.task import load_task

TASK = """
import torch

def inputs(seed):
    return torch.randn(64, 24, generator=torch.Generator().manual_seed(seed))

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))

def calibration_batches():
    return [inputs(1), inputs(2)]

DENSE = model()(inputs(3)).detach()

def evaluate(model):
    return {"near": -float((model(inputs(3)) - DENSE).square().mean() / DENSE.square().mean())}
"""
TWO = ("--formats", "svd,sparse")


@pytest.fixture
def dense(fixtures):
    return fixtures / "digits_mlp.safetensors"


@pytest.fixture
def small(tmp_path):
    """The model of a task.py, both in the current folder of the command."""
    (tmp_path / "task.py").write_text(TASK)
    save_file(load_task(str(tmp_path / "task.py"), ["model"]).model().state_dict(), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def test_one_budget_is_enough(tcompress, dense):
    done = tcompress("compress", dense, "--keep", "0.1", "--formats", "svd,sparse", "-o", "s.safetensors", "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    assert sum(layer["stored_bytes"] for layer in document["layers"]) <= 0.1 * (128 * 128 + 128 * 64 + 10 * 128) * 4
    types = {layer["stored_dtype"] for layer in document["layers"]}
    assert "int3" in types
    assert types <= {"int3", "int4", "int8", "fp16", "fp32", None}
    assert tcompress("verify", "s.safetensors", "--against", dense).code == 0


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("out", 2, "end the name with .safetensors"), ("there.safetensors", 7, "exists")],
)
def test_where_to_write_is_known_to_be_right_before_a_task_runs(name, code, message, tcompress, small):
    (small.parent / "task.py").write_text("raise RuntimeError('it ran')")
    (small.parent / "there.safetensors").write_bytes(b"")
    done = tcompress("compress", small, "--keep", "0.3", "--task", "task.py", "-o", name)
    assert (done.code, done.out) == (code, "")
    assert message in done.err
    assert "it ran" not in done.err


def test_a_dry_run_asks_nothing_of_where_it_would_write(tcompress, small):
    (small.parent / "there.safetensors").write_bytes(b"")
    done = tcompress("compress", small, "--format", "svd", "--rank", "2", "--dry-run", "-o", "there.safetensors")
    assert (done.code, done.err) == (0, "")


def test_a_plan_that_was_written_does_what_the_budget_does(tcompress, dense):
    budget = ("--max-bytes", "15kB", "--formats", "svd,sparse")
    shown = tcompress("plan", dense, *budget, "-o", "plan.json")
    assert (shown.code, shown.err) == (0, "")
    assert "planned 3 layers" in shown.out
    assert tcompress("compress", dense, "--plan", "plan.json", "-o", "a.safetensors").code == 0
    done = tcompress("compress", dense, *budget, "-o", "b.safetensors")
    assert done.code == 0
    assert " int4 " in done.out  # nobody asked for it: the table says it
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert 13000 < Path("a.safetensors").stat().st_size <= 15000


def test_what_is_assumed_of_inputs_is_said_by_the_plan(tcompress, fixtures):
    model = fixtures / "digits_cnn.safetensors"
    for number, (assumed, given) in enumerate([({"smooth"}, ()), (set(), ("--inputs", "plain"))]):
        assert tcompress("plan", model, "--keep", "0.2", *given, "-o", f"{number}.json", *TWO).code == 0
        rules = json.loads(Path(f"{number}.json").read_text("utf-8"))["rules"]
        assert {rule["inputs"] for rule in rules if "inputs" in rule} == assumed
    done = tcompress("compress", model, "--plan", "0.json", "--inputs", "plain", "-o", "o.safetensors")
    assert (done.code, "--plan says everything" in done.err) == (2, True)
    for given in ((), ("--inputs", "smooth")):
        done = tcompress("compress", model, "-f", "svd:rank=2", *given, "--dry-run", "--json")
        assert {rule.get("inputs") for rule in json.loads(done.out)["plan"]["rules"]} == {*given[1:]} or {None}


def test_a_layer_can_be_explained(tcompress, dense):
    shown = tcompress("plan", dense, "--keep", "0.2", "--formats", "svd,sparse", "--explain", "hidden.weight", "--json")
    curve = json.loads(shown.out)["curve"]
    assert [each["stored_bytes"] for each in curve] == sorted(each["stored_bytes"] for each in curve)
    assert sum(each["chosen"] for each in curve) == 1
    assert {each["format"] for each in curve} == {"dense", "svd", "sparse"}
    unknown = tcompress("plan", dense, "--keep", "0.2", "--formats", "svd", "--explain", "nothing")
    assert (unknown.code, unknown.out) == (2, "")
    assert "there is no layer nothing" in unknown.err


def test_a_layer_that_is_not_there_is_told_with_those_that_are(tcompress, dense):
    answer = tcompress("plan", dense, "--keep", "0.2", *TWO, "--explain", "nothing")
    assert (answer.code, answer.err) == (
        2,
        "error: --explain: there is no layer nothing; there are hidden.weight, input.weight, output.weight\n",
    )


@pytest.mark.parametrize(
    ("budget", "tiny", "why"),
    [
        (("--keep", "1"), "nothing tried is smaller", "its bytes are worth more here than elsewhere"),
        (("--max-error", "0"), "nothing tried is smaller", "whatever is smaller has a larger error than is allowed"),
        (("--flops", "1"), "nothing tried multiplies less", "its multiplications are worth more here than elsewhere"),
    ],
)
def test_a_dense_layer_says_which_reason_it_has(tcompress, tmp_path, budget, tiny, why):
    large = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    save_file({"tiny.weight": torch.eye(2), "large.weight": large}, tmp_path / "two.safetensors")
    document = json.loads(tcompress("plan", "two.safetensors", *budget, *TWO, "--dtype", "fp32", "--json").out)
    assert {layer["name"]: layer["why"] for layer in document["layers"]} == {"tiny.weight": tiny, "large.weight": why}


def test_a_task_makes_outputs_nearer(tcompress, small):
    budget = ("--keep", "0.15", "--dtype", "int8", "--formats", "sparse")
    done = tcompress("compress", small, *budget, "--task", "task.py", "-o", "s.safetensors")
    assert (done.code, done.err) == (0, "")
    assert "of output" in done.out
    assert tcompress("calibrate", small, "--task", "task.py", "-o", "stats.safetensors").code == 0
    assert tcompress("plan", small, *budget, "--stats", "stats.safetensors").code == 0
    save_file({"other.weight": torch.ones(8, 8)}, "other.safetensors")
    answer = tcompress("plan", "other.safetensors", *budget, "--stats", "stats.safetensors")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err.startswith("error: stats.safetensors: holds statistics of another checkpoint than other.safe")


def test_multiplications_are_a_budget_of_compress_too(tcompress, dense):
    shown = tcompress("plan", dense, "--flops", "0.5", *TWO, "-o", "plan.json", "--json")
    document = json.loads(shown.out)
    totals = document["totals"]
    assert (document["budget"], document["budget_bytes"]) == ({"flops": 0.5}, None)
    assert totals["multiplications"] <= 0.5 * totals["dense_multiplications"]
    options = ("--flops", "0.5", "--rank-multiple", "8", "--formats", "svd", "-o", "s.safetensors", "--json")
    done = json.loads(tcompress("compress", dense, *options).out)
    ranks = [layer["options"]["rank"] for layer in done["layers"] if layer["format"] == "svd"]
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)


def test_an_error_is_a_budget_that_compress_then_keeps_as_a_limit(tcompress, dense):
    assert tcompress("plan", dense, "--max-error", "0.2", *TWO, "-o", "plan.json").code == 0
    options = ("--plan", "plan.json", "-o", "s.safetensors")
    assert tcompress("compress", dense, *options, "--max-error", "0.2").code == 0


def test_a_score_is_a_budget(tcompress, small):
    options = ("--max-drop", "0.05", "--task", "task.py", *TWO, "--dtype", "int8", "--max-evaluations", "3")
    done = tcompress("plan", small, *options, "-o", "plan.json", "--json")
    assert (done.code, done.err) == (0, "")
    document = json.loads(done.out)
    search = document["search"]
    assert (document["budget"], search["score"], len(search["evaluated"])) == ({"max_drop": 0.05}, "near", 3)
    chosen = min((each for each in search["evaluated"] if each["drop"] <= 0.05), key=lambda each: each["keep"])
    assert document["totals"]["stored_bytes"] == chosen["stored_bytes"]
    assert Path("plan.evaluations.json").is_file()
    again = tcompress("plan", small, *options, "-o", "plan.json")
    assert again.out.count("known from before") == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--flops", "0.0001", "--formats", "svd"], 3, "multiplications; the smallest takes"),
        (["--keep", "0.5", "--flops", "0.5"], 2, "give one budget"),
        (["--max-drop", "1", "--keep", "0.5", "--task", "missing.py"], 2, "give one budget"),
        (["--max-drop", "1"], 2, "give --task"),
        (["--keep", "0.0001", "--formats", "svd"], 3, "the smallest takes"),
        (["--keep", "0.5", "--max-bytes", "1MB"], 2, "give one budget"),
        ([], 2, "give one budget"),
        (["--keep", "0.5", "--formats", "svd,nothing"], 2, "there is no format 'nothing'"),
        (["--keep", "0.5", "--formats", "joint"], 2, "several layers at once"),
        (["--keep", "0.5", "--strip-prefix", "module."], 2, "give --task"),
        (["--keep", "0.5", "--inputs", "rough"], 2, "--inputs: 'rough' is none of smooth, plain"),
        (["--keep", "0.5", "--inputs", "smooth", "--task", "task.py"], 2, "leave it out beside those"),
        (["--keep", "0.5", "--inputs", "smooth", "--stats", "stats.safetensors"], 2, "leave it out beside those"),
        (["--keep", "0.5", "--include", "nothing"], 2, "no layer matches nothing"),
        (["--keep", "0.5", "--task", "missing.py"], 2, "there is no such task file"),
        (["--keep", "0.5", "--stats", "missing.safetensors"], 4, "missing.safetensors"),
    ],
)
def test_what_cannot_be_is_one_line(tcompress, dense, arguments, code, message):
    answer = tcompress("plan", dense, *arguments, "-o", "plan.json")
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.count("\n") == 1
    assert message in answer.err
    assert not Path("plan.json").exists()


def test_the_seconds_of_compress_are_those_of_its_plan_too(tcompress, dense):
    tcompress("compress", dense, "--keep", "0.1", "--formats", "sparse", "--dry-run")  # imports count for neither
    started = time.perf_counter()
    done = tcompress("compress", dense, "--keep", "0.1", "--dry-run", "--json")
    elapsed = time.perf_counter() - started
    assert 0.5 * elapsed < json.loads(done.out)["seconds"] <= elapsed


@pytest.mark.parametrize("command", ["plan", "compress"])
@pytest.mark.parametrize("keep", ["0.95", "0.01"])
def test_a_value_that_is_not_finite_stops_the_planner_too(tcompress, tmp_path, command, keep):
    tensors = {"fc.weight": torch.ones(64, 64), "whole.weight": torch.randn(64, 64)}
    tensors["fc.weight"][3, 4] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    out = "out.json" if command == "plan" else "out.safetensors"
    arguments = (command, "nan.safetensors", "--keep", keep, "--formats", "sparse", "-o", out)
    answer = tcompress(*arguments)
    assert (answer.code, answer.out) == (6, "")
    way_out = "--allow-nonfinite leaves such layers dense"
    assert answer.err == f"error: nan.safetensors: tensor fc.weight: holds 1 value that is NaN or Inf; {way_out}\n"
    answer = tcompress(*arguments, "--allow-nonfinite", "--json")
    if keep == "0.95":
        assert answer.code == 0
        (layer,) = [each for each in json.loads(answer.out)["layers"] if each["name"] == "fc.weight"]
        assert layer["why" if command == "plan" else "reason"] == "holds 1 value that is NaN or Inf"
    else:
        assert (answer.code, answer.out) == (3, "")
