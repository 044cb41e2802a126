"""The figures as files: they are drawn for any name, the same every time, and whole or not there."""

from __future__ import annotations

import math
from xml.etree import ElementTree as ET

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import OutputError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.report import drawing, plots, writing
from tcompress.report.asked import split_asked
from tcompress.workflow.analysis import analyze
from tcompress.workflow.plan import Target
from tcompress.workflow.removal import removals
from tcompress.workflow.settings import Settings

CHOICES = [Target(SVD, keep=0.5), Target(Sparse, keep=0.5), Target(SVD, keep=0.25)]


def drawn(path, folder, choices=CHOICES):
    model = open_checkpoint(path)
    found = analyze(model, choices, settings=Settings(allow_nonfinite=True))
    return plots.draw(found, removals(model, found.layers), folder)


def test_two_runs_write_the_same_bytes(model_file, tmp_path):
    first, _ = drawn(model_file, tmp_path / "a")
    second, notes = drawn(model_file, tmp_path / "b")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert [path.name for path in first[:4]] == [
        "errors.png", "errors.svg", "weights-conv.weight.png", "weights-conv.weight.svg",
    ]  # fmt: skip
    (note,) = notes
    assert note.startswith("no figure of depthwise.weight: no svd fits 230 of 2304 bytes")
    for path in first:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
        assert b"Matplotlib v" not in path.read_bytes()


def test_names_from_strangers_are_text_and_never_paths(tmp_path):
    names = [
        "../../etc/passwd.weight",
        "aB$x^{2$.weight",
        "Ab$x^{2$.weight",
        "line\nfeed\x1b[31m.weight",
        "\u5c64\U0001f600.weight",
        "<script>&.weight",
        "deep." * 300 + "weight",
        "deep." * 300 + "kernel",
        "errors.weight",
    ]
    save_file({name: torch.randn(40, 40) for name in names}, tmp_path / "hostile.safetensors")
    files, notes = drawn(tmp_path / "hostile.safetensors", tmp_path / "plots")
    assert notes == []
    assert len({str(path).lower() for path in files}) == 2 * (len(names) + 1)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(path.name for path in files)
    for path in files[1::2]:
        ET.parse(path)
    for path in files:
        assert path.parent == tmp_path / "plots"
        assert set(path.name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
        assert len(path.name) < 100


def test_a_layer_that_is_nothing_but_nan_leaves_a_gap(tmp_path):
    weights = {"a.weight": torch.full((40, 40), math.nan), "b.weight": torch.randn(40, 40)}
    save_file(weights, tmp_path / "nan.safetensors")
    files, notes = drawn(tmp_path / "nan.safetensors", tmp_path / "plots")
    assert [path.stem for path in files[::2]] == ["errors", "weights-b.weight"]
    assert notes == ["no figure of a.weight: holds 1600 values that are NaN or Inf"]


def test_the_error_figure_has_a_panel_for_each_amount_and_every_error_in_it(model_file):
    found = analyze(open_checkpoint(model_file), CHOICES)
    figure = plots.error_figure(found)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["keep=0.5", "keep=0.25"]
    for axes, asked in zip(figure.axes, (["svd:keep=0.5", "sparse:keep=0.5"], ["svd:keep=0.25"]), strict=True):
        for line, choice in zip(axes.lines, asked, strict=True):
            errors = [row.relative_error for row in found.rows if row.asked == choice]
            assert [None if math.isnan(y) else y for y in line.get_ydata()] == errors
    labels = [text.get_text() for text in figure.axes[-1].get_xticklabels()]
    assert labels == ["conv", "depthwise", "embed_tokens", "fc", "half"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["svd", "sparse", "spatial convolution", "linear, embedding"]


def test_spatial_pointwise_and_linear_layers_are_told_apart(fixtures):
    found = analyze(open_checkpoint(fixtures / "digits_cnn.safetensors"), [SVD(rank=2)])
    kinds = {row.layer.name: plots._band(row) for row in found.rows}
    assert kinds["pointwise.weight"] == "pointwise convolution"
    assert kinds["depthwise.weight"] == kinds["conv1.weight"] == "spatial convolution"
    assert kinds["fc.weight"] == "linear, embedding"


def test_many_layers_keep_a_figure_of_sane_size(tmp_path):
    save_file({f"l{i:04}.weight": torch.ones(2, 2) for i in range(900)}, tmp_path / "many.safetensors")
    figure = plots.error_figure(analyze(open_checkpoint(tmp_path / "many.safetensors"), [SVD(rank=1)]))
    assert figure.get_size_inches()[0] <= 30
    assert len(figure.axes[0].get_xticks()) <= 120


def test_drawing_leaves_the_settings_of_others_alone(model_file, tmp_path):
    before = dict(drawing.matplotlib.rcParams)
    drawn(model_file, tmp_path / "plots")
    assert dict(drawing.matplotlib.rcParams) == before


def test_nothing_half_written_stays_and_the_old_file_is_kept(tmp_path, monkeypatch):
    target = tmp_path / "errors.png"
    target.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.Path, "replace", full)
        with pytest.raises(OutputError, match=r"errors\.png: cannot be written"):
            writing.write_whole(target, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("errors.png", b"old")]
    writing.write_whole(target, b"new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        ("svd:seed=0:keep=0.5", ("svd", "keep=0.5")),
        ("svd:seed=1:rank=9", ("svd:seed=1", "rank=9")),
        ("tt:ranks=4,8,4:order=3", ("tt:order=3", "ranks=4,8,4")),
        ("sparse:density=0.1", ("sparse", "density=0.1")),
        ("shuffled:rank=8:inner=tt:inner.order=3", ("shuffled:inner=tt:inner.order=3", "rank=8")),
    ],
)
def test_what_is_asked_is_split_into_what_and_how_much(asked, parts):
    assert split_asked(asked) == parts
