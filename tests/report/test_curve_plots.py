"""Figures of curves: the same every time, the control beside the layer, bounds as a band."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.report import curve_plots, drawing
from tcompress.workflow.error_curves import error_curves


@pytest.fixture
def curves(tmp_path):
    weights = {name: torch.randn(24, 24) for name in ("../a.weight", "..:a.weight")}
    save_file(weights, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    return error_curves(checkpoint, find_layers(checkpoint), [SVD(rank=1), TT(rank=1)])


def test_two_runs_write_the_same_bytes_into_a_file_of_its_own_for_each_layer(curves, tmp_path):
    first, second = (curve_plots.draw_curves(curves[::2], tmp_path / folder) for folder in "ab")
    assert [path.name for path in first] == [
        "curves-.._a.weight.png", "curves-.._a.weight.svg", "curves-.._a.weight-2.png", "curves-.._a.weight-2.svg",
    ]  # fmt: skip
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_panel_has_the_layer_and_its_control_and_a_band_between_bounds(curves):
    with drawing.styled():
        figure = curve_plots.curve_figure(curves[:2])
    for axes, curve in zip(figure.axes, curves, strict=False):
        own, control = axes.lines
        assert list(own.get_ydata()) == [point.error for point in curve.points]
        assert list(control.get_ydata()) == [point.control for point in curve.points]
        assert (control.get_linestyle(), axes.get_yscale()) == ("--", "log")
        assert len(axes.collections) == (0 if curve.is_exact else 2)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["svd", "tt (at most; band: at least)"]


def test_errors_of_zero_can_be_drawn(tmp_path):
    save_file({"zero.weight": torch.zeros(8, 8)}, tmp_path / "zero.safetensors")
    checkpoint = open_checkpoint(tmp_path / "zero.safetensors")
    found = error_curves(checkpoint, find_layers(checkpoint), [SVD(rank=1), Sparse(density=0.5)])
    assert len(curve_plots.draw_curves(found, tmp_path / "plots")) == 2
