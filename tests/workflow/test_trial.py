"""What a setting is told to lose as it is stored, against what it loses."""

from __future__ import annotations

import pytest
import torch

from tcompress.checkpoint.dtypes import BY_CODE
from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.encodings import INT4
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.metric import PLAIN, Metric
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker
from tcompress.workflow.curves import default_formats
from tcompress.workflow.fitting import fit
from tcompress.workflow.prospects import Prospects
from tcompress.workflow.trial import Trial

FLOAT32 = BY_CODE["F32"]
CPU = torch.device("cpu")
TYPES = [INT4, torch.int8, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(weight: torch.Tensor) -> Layer:
    return Layer("l.weight", LayerKind.LINEAR, tuple(weight.shape), FLOAT32)


def trial_of(weight, metric=PLAIN):
    return Trial(layer(weight), weight, metric, default_formats(), CPU)


@pytest.mark.parametrize("setting", [SVD(6), Sparse(0.4), LowRankSparse(0.2, rank=2)], ids=str)
def test_a_small_layer_is_measured_as_it_is_stored(setting):
    weight = torch.randn(40, 32)
    for candidate in trial_of(weight).stored(setting, TYPES):
        stored = fit(weight, setting, store=candidate.store, device=CPU)
        assert candidate.loss == pytest.approx(stored.relative_error**2, rel=0.02)
        assert candidate.stored_bytes == pytest.approx(stored.stored_bytes, rel=0.02)


@pytest.mark.parametrize("setting", [SVD(20), Sparse(0.4), Sparse(0.1)], ids=str)
def test_some_rows_of_a_tall_layer_tell_of_all(setting):
    weight = torch.randn(8000, 64) * torch.rand(64)
    for candidate in trial_of(weight).stored(setting, TYPES):
        stored = fit(weight, setting, store=candidate.store, device=CPU)
        assert candidate.loss == pytest.approx(stored.relative_error**2, rel=0.05)


def test_what_codes_add_is_told_from_the_settings_before():
    weight = torch.randn(600, 300)
    trial = trial_of(weight)
    for density in (0.9, 0.5, 0.25, 0.1):
        for candidate in trial.stored(Sparse(density), TYPES):
            stored = fit(weight, Sparse(density), store=candidate.store, device=CPU)
            assert candidate.loss == pytest.approx(stored.relative_error**2, rel=0.05)


def test_a_moment_decides_what_counts():
    weight = torch.randn(20, 16)
    gram = torch.diag(torch.tensor([100.0, *[1e-3] * 15]))
    (candidate,) = trial_of(weight, Metric(gram)).stored(SVD(1), [torch.float32])
    assert candidate.loss < 1e-3


def test_a_type_whose_range_a_factor_exceeds_is_no_choice():
    weight = torch.randn(20, 16) * 1e9
    stored = {candidate.store for candidate in trial_of(weight).stored(Sparse(0.5), TYPES)}
    assert torch.float16 not in stored
    assert torch.float32 in stored


def prospects(weight, slack=0.95):
    made = layer(weight)
    return Prospects(made, Trial(made, weight, PLAIN, default_formats(), CPU).outlooks, TYPES, slack)


def test_a_format_that_noise_does_not_suit_is_not_fitted():
    noise = prospects(torch.randn(96, 96))
    assert not list(noise.worth(Tucker, (0.5, 0.2, 0.1)))
    assert list(noise.worth(Sparse, (0.5, 0.2, 0.1)))


def test_a_format_that_suits_a_weight_is_fitted():
    weight = Tucker(4).fit(torch.randn(96, 96)).reconstruct().detach()
    assert list(prospects(weight).worth(Tucker, (0.5, 0.2, 0.1)))
