"""analyze --curves as a person uses it: a table, a document, figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

QUICK = ("--no-structure", "--format", "svd", "--format", "sparse", "--keep", "0.25")
TASK = """
import torch

def model():
    model = torch.nn.Sequential()
    for name, features in (("low", 32), ("noise", 40)):
        model.add_module(name, torch.nn.Linear(32, features, bias=False))
    return model

def calibration_batches():
    return [torch.randn(64, 32, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 3, 32)]
"""


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(32, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    noise = torch.randn(40, 32, generator=generator)
    save_file({"low.weight": low, "noise.weight": noise}, tmp_path / "model.safetensors")
    return "model.safetensors"


def test_the_table_tells_a_layer_with_structure_from_one_without(tcompress, model):
    plain = tcompress("analyze", model, *QUICK)
    answer = tcompress("analyze", model, *QUICK, "--format", "low-rank-sparse", "--curves")
    assert (answer.code, answer.err) == (0, "")
    assert "shuffled" not in plain.out
    table = answer.out[answer.out.index("error 0.3") :]
    rows = [line.split() for line in table.splitlines()]
    low = next(row for row in rows if row[:2] == ["low.weight", "svd"])
    noise = next(row for row in rows if row[:2] == ["noise.weight", "svd"])
    assert low[2:] == ["25.0%", "larger", "25.0%", "larger"]
    assert noise[2:] == ["larger"] * 4
    assert "no curve of low-rank-sparse for 2 of 2 layers: each of its sizes is a fit of its own" in table


def test_the_document_has_the_curves_only_where_they_were_asked_for(tcompress, model):
    assert "curves" not in json.loads(tcompress("analyze", model, *QUICK, "--json").out)
    document = json.loads(tcompress("analyze", model, *QUICK, "--curves", "--json").out)
    low, pruned, *_ = document["curves"]
    assert (low["name"], low["format"], low["exact"], low["error_of"]) == ("low.weight", "svd", True, "weight")
    assert [point["options"]["rank"] for point in low["points"]] == list(range(1, 17))
    assert [point["error"] < 1e-6 for point in low["points"]] == [False] * 3 + [True] * 13
    assert all(point["control"] > 0.2 for point in low["points"])
    assert [each["error"] for each in low["needed"]] == [0.3, 0.1]
    assert all(point["error"] == point["control"] for point in pruned["points"])


def test_curves_of_a_format_need_no_size(tcompress, model):
    answer = tcompress("analyze", model, "--curves", "--format", "svd", "--format", "sparse:density=0.2", "--json")
    assert (answer.code, answer.err) == (0, "")
    document = json.loads(answer.out)
    assert {curve["format"] for curve in document["curves"]} == {"svd", "sparse"}
    asked = [text.replace("seed=0:", "") for text in document["asked"]]
    assert asked == ["svd:keep=0.5", "svd:keep=0.25", "svd:keep=0.1", "sparse:density=0.2"]
    alone = tcompress("analyze", model, "--format", "svd")
    assert (alone.code, "how much is to be kept?" in alone.err) == (2, True)


def test_figures_of_curves_are_drawn_and_listed(tcompress, model, tmp_path):
    options = (
        "--no-structure",
        "--format",
        "svd:rank=2",
        "--layers",
        "low.*",
        "--curves",
        "--plots",
        "plots",
        "--json",
    )
    document = json.loads(tcompress("analyze", model, *options).out)
    files = [f"plots/curves-low.weight.{suffix}" for suffix in ("png", "svg")]
    assert document["plots"][-2:] == files
    assert all((tmp_path / file).is_file() for file in files)


def test_with_statistics_errors_are_those_of_outputs(tcompress, model):
    Path("task.py").write_text(TASK)
    assert tcompress("calibrate", model, "--task", "task.py", "-o", "stats.safetensors").code == 0
    document = json.loads(tcompress("analyze", model, *QUICK, "--curves", "--stats", "stats.safetensors", "--json").out)
    plain = json.loads(tcompress("analyze", model, *QUICK, "--curves", "--json").out)
    assert document["curves"][2]["error_of"] == "output"
    assert document["curves"][2]["points"][3]["error"] < plain["curves"][2]["points"][3]["error"]
    shown = tcompress("analyze", model, *QUICK, "--curves", "--stats", "stats.safetensors").out
    assert "errors are those of the outputs of 2 of 2 layers" in shown


def test_statistics_without_curves_or_of_another_model_are_refused(tcompress, model):
    answer = tcompress("analyze", model, "--stats", "stats.safetensors")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == "error: --stats says how --curves measures errors; give --curves as well\n"
    Path("task.py").write_text(TASK)
    assert tcompress("calibrate", model, "--task", "task.py", "-o", "stats.safetensors").code == 0
    save_file({"other.weight": torch.ones(8, 8)}, "other.safetensors")
    answer = tcompress("analyze", "other.safetensors", "--curves", "--stats", "stats.safetensors")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err.startswith("error: stats.safetensors: holds statistics of another checkpoint")
