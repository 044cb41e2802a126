"""Removing the low-rank part: counts, kurtosis and error of what is left."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import kurtosis

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.workflow.plan import Target
from tcompress.workflow.removal import BINS, low_rank_of, removals


def removed(path, low_rank=None):
    model = open_checkpoint(path)
    return {found.layer.name: found for found in removals(model, find_layers(model), low_rank)}


def test_every_value_is_counted_before_and_after(model_file):
    found = removed(model_file)
    for name in ("conv.weight", "embed_tokens.weight", "fc.weight", "half.weight"):
        each = found[name]
        assert len(each.before.counts) == len(each.after.counts) == BINS
        assert sum(each.before.counts) == sum(each.after.counts) == each.layer.values


def test_kurtosis_and_error_are_those_of_scipy_and_of_the_fit(model_file):
    weight = open_checkpoint(model_file).read("conv.weight")
    found = removed(model_file)["conv.weight"]
    rank = 32 * 144 // 10 // (32 + 144)
    assert found.format == SVD(rank=rank)
    rest = weight - SVD(rank=rank).fit(weight).reconstruct().detach()
    assert found.before.kurtosis == pytest.approx(kurtosis(weight.double().numpy().ravel()), rel=1e-9)
    assert found.after.kurtosis == pytest.approx(kurtosis(rest.double().numpy().ravel()), rel=1e-6)
    assert found.relative_error == pytest.approx(float(rest.norm() / weight.norm()), rel=1e-5)


def test_a_tenth_of_the_values_whatever_their_type(model_file):
    found = removed(model_file)
    assert found["half.weight"].format == found["fc.weight"].format == SVD(rank=64 * 80 // 10 // (64 + 80))


def test_outliers_are_counted_in_the_outermost_bins(tmp_path):
    weight = torch.randn(60, 60, generator=torch.Generator().manual_seed(0))
    weight[3, 4] = 1000.0
    weight[5, 6] = -1000.0
    save_file({"a.weight": weight}, tmp_path / "m.safetensors")
    (found,) = removed(tmp_path / "m.safetensors").values()
    assert found.limit < 1000
    assert found.before.counts[0] == found.before.counts[-1] == 1
    assert sum(found.before.counts) == weight.numel()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_very_large_and_small_values_have_the_same_shape(tmp_path, scale):
    weight = torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_file({"a.weight": weight}, tmp_path / "plain.safetensors")
    save_file({"a.weight": weight * scale}, tmp_path / "scaled.safetensors")
    (plain,) = removed(tmp_path / "plain.safetensors").values()
    (scaled,) = removed(tmp_path / "scaled.safetensors").values()
    assert scaled.before.kurtosis == pytest.approx(plain.before.kurtosis)
    assert sum(scaled.before.counts) == 3600


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_values_that_are_all_alike_have_no_kurtosis(tmp_path, value):
    save_file({"a.weight": torch.full((60, 60), value)}, tmp_path / "flat.safetensors")
    (found,) = removed(tmp_path / "flat.safetensors").values()
    assert found.before.kurtosis is found.after.kurtosis is None
    assert found.relative_error == pytest.approx(0, abs=1e-6)
    assert sum(found.before.counts) == sum(found.after.counts) == 3600


def test_a_layer_too_small_for_a_tenth_is_passed_over_with_the_reason(model_file):
    found = removed(model_file)["depthwise.weight"]
    assert found.format is None
    assert found.reason.startswith("no svd fits 230 of 2304 bytes")


def test_the_low_rank_part_is_the_first_low_rank_format_asked_for(model_file):
    assert low_rank_of(None) == low_rank_of([Target(Sparse, keep=0.5)]) == Target(SVD, keep=0.1)
    assert low_rank_of([Sparse(density=0.1), TT(rank=4, order=3), SVD(rank=2)]) == Target(TT, {"order": 3}, keep=0.1)
    assert low_rank_of([Target(TT, {"order": 4}, tolerance=0.1)]) == Target(TT, {"order": 4}, keep=0.1)
    assert removed(model_file, low_rank_of([TT(rank=4)]))["fc.weight"].format.name == "tt"
