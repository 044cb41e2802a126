"""analyze on the command line: the verdict at equal bytes, and figures in a folder."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT

QUICK = ("--no-structure", "--format", "svd", "--format", "sparse", "--keep", "0.25")


def python(program, *arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=True)


@pytest.fixture
def planted(tmp_path):
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    sparse = torch.randn(64, 64, generator=generator) * (torch.rand(64, 64, generator=generator) < 0.1)
    tensors = {"low.weight": low, "sparse.weight": sparse, "tiny.weight": torch.randn(2, 2, generator=generator)}
    save_file(tensors, tmp_path / "planted.safetensors")
    return "planted.safetensors"


def test_the_table_says_what_is_best_for_each_layer_and_for_how_many(tcompress, planted):
    answer = tcompress("analyze", planted, *QUICK)
    rows = [line.split() for line in answer.out.splitlines()]
    assert [row for row in rows if row[:1] == ["best"]] == [["best", "low-rank"], ["best", "sparse"]]
    assert ["(svd)"] in rows
    said = "smallest error at equal bytes, keep=0.25: low-rank 1 layer, sparse 1, nothing fits 1"
    assert said in answer.out.splitlines()
    assert "seed=0" not in answer.out


def test_the_document_says_what_is_best(tcompress, planted):
    document = json.loads(tcompress("analyze", planted, *QUICK, "--json").out)
    assert [(best["name"], best["keep"], best["family"]) for best in document["best"]] == [
        ("low.weight", 0.25, "low-rank"),
        ("sparse.weight", 0.25, "sparse"),
    ]
    assert list(document["best"][0]) == [
        "name", "keep", "family", "asked", "format", "options", "stored_bytes", "relative_error",
    ]  # fmt: skip
    assert (document["plots"], document["notes"]) == ([], [])


@pytest.mark.parametrize("width", [80, 160])
def test_a_narrow_terminal_shows_every_figure_and_says_what_it_leaves_out(planted, tmp_path, width):
    program = (
        "import sys, rich.console as c; from tcompress.cli import console; from tcompress.cli.app import run\n"
        f"console.Console = lambda **k: c.Console(highlight=False, force_terminal=True, color_system=None, "
        f"width={width})\nsys.exit(run(sys.argv[1:]))"
    )
    done = python(program, "analyze", planted, "--no-structure", cwd=tmp_path)
    left_out = [line for line in done.stdout.splitlines() if line.startswith("left out at this width: ")]
    assert len(left_out) == (1 if width == 80 else 0)
    assert "low.weight " in done.stdout
    assert "…" not in done.stdout


def test_figures_are_drawn_and_listed_and_drawn_again(tcompress, planted, tmp_path):
    answer = tcompress("analyze", planted, *QUICK, "--plots", "plots")
    assert (answer.code, answer.err) == (0, "")
    names = ["errors", "weights-low.weight", "weights-sparse.weight"]
    expected = [f"{name}.{suffix}" for name in names for suffix in ("png", "svg")]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == expected
    *_, note, last = answer.out.splitlines()
    assert note.startswith("note: no figure of tiny.weight: no svd fits 1 of 16 bytes")
    assert last == "drew 3 figures in plots"
    document = json.loads(tcompress("analyze", planted, *QUICK, "--plots", "plots", "--json").out)
    assert document["plots"] == [f"plots/{name}" for name in expected]


def test_without_matplotlib_it_says_how_to_get_it_before_any_work(tcompress, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    answer = tcompress("analyze", "missing.safetensors", "--plots", "plots")
    assert (answer.code, answer.out) == (2, "")
    assert answer.err == 'error: --plots needs matplotlib: pip install "tcompress[plots]"\n'


@pytest.mark.usefixtures("planted")
@pytest.mark.parametrize("where", ["no/such/plots", "planted.safetensors", "/proc/plots"])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tcompress, where, tmp_path):
    before = sorted(tmp_path.iterdir())
    answer = tcompress("analyze", "missing.safetensors", "--plots", where)
    assert (answer.code, answer.out) == (7, "")
    assert answer.err.startswith(f"error: {where}: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_that_cannot_be_read_leaves_no_folder(tcompress, tmp_path):
    assert tcompress("analyze", "missing.safetensors", "--plots", "plots").code == 4
    assert list(tmp_path.iterdir()) == []


def test_help_and_a_run_without_plots_do_not_import_matplotlib(planted, tmp_path):
    for arguments in (["analyze", "--help"], ["analyze", planted, *QUICK]):
        program = "import sys; from tcompress.cli.app import run; run(sys.argv[1:]); print('matplotlib' in sys.modules)"
        done = python(program, *arguments, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == "False"
