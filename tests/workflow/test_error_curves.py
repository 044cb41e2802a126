"""Curves say what fits then measure: to the digit, or between their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.statistics_file import LayerStatistics, Statistics
from tcompress.formats.base import matrix_of
from tcompress.formats.cp import CP
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker
from tcompress.linalg.distance import compare
from tcompress.linalg.permutation import shuffled
from tcompress.workflow.error_curves import error_curves
from tcompress.workflow.plan import Target
from tcompress.workflow.settings import Settings


def curves_of(path, choices, **options):
    checkpoint = open_checkpoint(path)
    found = error_curves(checkpoint, find_layers(checkpoint), choices, **options)
    return {(curve.layer.name, curve.format): curve for curve in found}, checkpoint


def measured(weight, setting):
    return compare(weight, setting.fit(weight).reconstruct().detach())[1]


def some(points):
    return points[:: max(1, len(points) // 4)]


@pytest.mark.parametrize(
    "choice", [SVD(rank=3), Target(SVD, {"matricisation": "spatial"}, keep=0.5), Sparse(density=0.1)]
)
def test_an_exact_curve_is_what_fits_measure(model_file, choice):
    curves, checkpoint = curves_of(model_file, [choice])
    assert {name for name, _ in curves} == {layer.name for layer in find_layers(checkpoint)}
    for (name, _), curve in curves.items():
        weight = checkpoint.read(name).float()
        assert curve.is_exact
        assert len(curve.points) > 1
        for point in some(curve.points):
            assert point.error == point.lower == pytest.approx(measured(weight, point.setting), rel=1e-4, abs=1e-6)
            control = measured(shuffled(weight, 0), point.setting)
            assert point.control == point.control_lower == pytest.approx(control, rel=1e-4, abs=1e-6)
            assert point.fraction <= 1
            assert point.stored_bytes == point.setting.stored_bytes(curve.layer.shape, curve.layer.dtype.torch)


@pytest.mark.parametrize("kind", [TT, TTMatrix, Tucker])
def test_bounds_hold_what_fits_measure(model_file, kind):
    curves, checkpoint = curves_of(model_file, [kind(rank=2), kind(rank=3)])
    fits = 0
    for (name, _), curve in curves.items():
        weight = checkpoint.read(name).float()
        for point in some(curve.points):
            for own, least, most in (
                (weight, point.lower, point.error),
                (shuffled(weight, 0), point.control_lower, point.control),
            ):
                fits += 1
                assert least - 1e-5 <= measured(own, point.setting) <= most + 1e-5
    assert fits > 20
    # A tensor-train matrix of two cores is cut once, and is as exact as svd.
    assert curves["fc.weight", kind.name].is_exact == (kind is TTMatrix)
    assert any(0 < point.lower < point.error for point in curves["conv.weight", kind.name].points)


def test_of_a_padded_tensor_there_is_no_bound_from_below(tmp_path):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(37, 29, generator=generator)
    save_file({"a.weight": weight}, tmp_path / "a.safetensors")
    curves, _ = curves_of(tmp_path / "a.safetensors", [TT(rank=1)])
    points = curves["a.weight", "tt"].points
    assert {point.lower for point in points} == {0.0}
    for point in some(points):
        assert measured(weight, point.setting) <= point.error + 1e-5


def test_needed_bytes_are_the_fewest(model_file):
    curves, checkpoint = curves_of(model_file, [SVD(rank=1), Sparse(density=0.5)])
    weight = checkpoint.read("fc.weight")
    for needed in curves["fc.weight", "svd"].needed:
        setting = SVD.reaching(weight, needed.error)
        fits = setting.stored_bytes((64, 80), torch.float32) <= weight.nbytes
        assert needed.stored_bytes == (setting.stored_bytes((64, 80), torch.float32) if fits else None)
        assert needed.control_bytes is None  # three planted ranks are nothing once they are shuffled
    assert curves["fc.weight", "svd"].needed[0].stored_bytes is not None
    for needed in curves["fc.weight", "sparse"].needed:
        assert needed.stored_bytes == needed.control_bytes  # pruning knows no order
        assert needed.stored_bytes == Sparse.reaching(weight, needed.error).stored_bytes((64, 80), torch.float32)


def test_two_runs_tell_the_same(model_file):
    choices = [SVD(rank=1), Tucker(rank=1)]
    assert curves_of(model_file, choices)[0] == curves_of(model_file, choices)[0]


@pytest.mark.parametrize("diagonal", [False, True])
def test_with_statistics_errors_are_those_of_outputs(model_file, diagonal):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 80, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 5, 80) * 1e-3
    moment = inputs.square().mean(dim=0) if diagonal else inputs.T @ inputs / 300
    told = LayerStatistics((64, 80), moment, torch.zeros(80), torch.ones(64), 300, 1.0)
    statistics = Statistics("", "loss", 1, {"fc.weight": told})
    choices = [SVD(rank=1), Sparse(density=0.5), TT(rank=1)]
    curves, checkpoint = curves_of(model_file, choices, statistics=statistics)
    weight = checkpoint.read("fc.weight")
    whole = torch.diag(moment) if diagonal else moment

    def of_output(error):
        matrix = matrix_of(error).double()
        return math.sqrt(float((matrix @ whole * matrix).sum()))

    exact = ["svd", "sparse"] if diagonal else ["svd"]
    for name in exact:
        curve = curves["fc.weight", name]
        assert curve.of_output
        for point in some(curve.points):
            found = point.setting.fit(weight, moment.float()).reconstruct().detach()
            error = of_output(weight - found) / of_output(weight)
            assert point.error == pytest.approx(error, rel=1e-3, abs=1e-5)
    assert [curves["fc.weight", name].reason is None for name in ("sparse", "tt")] == [diagonal, False]
    assert not curves["half.weight", "svd"].of_output  # nothing is known of its inputs


def test_what_has_no_curve_has_a_reason(tmp_path):
    weights = {
        "bad.weight": torch.full((8, 8), math.nan),
        "zero.weight": torch.zeros(8, 8),
        "one.weight": torch.ones(1, 1),
    }
    save_file(weights, tmp_path / "odd.safetensors")
    choices = [SVD(rank=1), CP(rank=1), Sparse(density=0.5, m=4), Sparse(density=0.5)]
    curves, _ = curves_of(tmp_path / "odd.safetensors", choices, settings=Settings(allow_nonfinite=True))
    assert curves["bad.weight", "svd"].reason == "holds 64 values that are NaN or Inf"
    assert "each of its sizes is a fit of its own" in curves["zero.weight", "cp"].reason
    assert "groups of n:m" in curves["zero.weight", "sparse:m=4"].reason
    assert "fewer elements" in curves["one.weight", "svd"].reason
    for name in ("svd", "sparse"):
        assert {point.error for point in curves["zero.weight", name].points} == {0.0}
