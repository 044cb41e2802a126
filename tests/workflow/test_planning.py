"""From rules to decisions: every problem told at once, clipped ranks and padding said."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import UsageError
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.workflow.analysis import analyze
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.inspection import inspect
from tcompress.workflow.plan import Target, plan_for


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (62, 37), "b.weight": (48, 40), "c.weight": (40, 48)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return open_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("choice", [TT(rank=2, out_modes=(6, 8)), Target(TT, {"out_modes": (6, 8)}, keep=0.5)], ids=str)
def test_modes_that_do_not_multiply_are_told_for_every_layer_before_any_work(model, tmp_path, choice):
    for attempt in (
        lambda: compress(model, plan_for(choice), out=tmp_path / "out.safetensors"),
        lambda: dry_run(model, plan_for(choice)),
        lambda: analyze(model, [choice]),
    ):
        with pytest.raises(UsageError) as caught:
            attempt()
        said = str(caught.value)
        assert "a.weight: tt: out_modes=6,8 makes 48, the weight has 62; choose modes whose product is 62" in said
        assert "c.weight: tt: out_modes=6,8 makes 48, the weight has 40; choose modes whose product is 40" in said
        assert "b.weight" not in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_problem_of_many_layers_is_told_once(tmp_path):
    save_file({f"layers.{n}.weight": torch.ones(10, 8) for n in range(6)}, tmp_path / "same.safetensors")
    with pytest.raises(UsageError) as caught:
        dry_run(open_checkpoint(tmp_path / "same.safetensors"), plan_for(TT(rank=2, out_modes=(3, 3))))
    names = "layers.0.weight, layers.1.weight, layers.2.weight and 3 more"
    assert str(caught.value).startswith(f"{names}: tt: out_modes=3,3 makes 9, the weight has 10")
    assert str(caught.value).count("out_modes") == 1


def test_a_wrong_number_of_ranks_is_told(model):
    with pytest.raises(UsageError, match=r"a.weight: tt: 2 ranks are given, modes .* have 3"):
        dry_run(model, plan_for(TT(ranks=(2, 2))))


def test_a_rank_above_the_dimensions_is_clipped_and_said(model, tmp_path):
    result = compress(model, plan_for(SVD(rank=99), include=["b.*"]), out=tmp_path / "out.safetensors")
    assert next(row for row in result.layers if row.layer.name == "b.weight").reason.startswith("larger than dense")
    found = analyze(model, [SVD(rank=99)])
    assert [row.notes for row in found.rows] == [(f"rank 99 is clipped to {n}",) for n in (37, 40, 40)]


def test_padding_is_said_and_recorded(model, tmp_path):
    result = compress(model, plan_for(TTMatrix(rank=3)), out=tmp_path / "out.safetensors")
    notes = {row.layer.name: row.notes for row in result.layers}
    assert notes == {
        "a.weight": ("62 is padded to 63", "37 is padded to 40"),
        "b.weight": (),
        "c.weight": (),
    }
    recorded = {row.name: row.format for row in inspect(open_checkpoint(tmp_path / "out.safetensors")).rows}
    assert recorded["a.weight"] == "ttm:rank=3:out_modes=7,9:in_modes=8,5:padding=1,3"
