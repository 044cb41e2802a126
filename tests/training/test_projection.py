"""The C step on codes: never farther from the weight than a fit that is rounded, and at rest where nothing is lost."""

from __future__ import annotations

import pytest
import torch

from tcompress.encodings import INT3, INT4
from tcompress.formats import FORMATS, make
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.training.projection import project
from tcompress.training.twin import Twin

SIZES = {
    "sparse": {"density": 0.2},
    "low-rank-sparse": {"rank": 2, "density": 0.1},
    "sparse-product": {"nonzeros": 3},
}
SETTINGS = [
    *(
        make(kind, SIZES.get(name, {str(kind.rank_option): 3}))
        for name, kind in FORMATS.items()
        if not issubclass(kind, GroupFormat)
    ),
    LowRankSparse(rank=2, density=0.1, reconstruction="masking", method="masking"),
]
GROUPED = Sparse(density=0.5, m=4)


def twin_of(setting, store, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(24, 36, dtype=dtype)
    return Twin(weight, setting, setting.fit(weight), store, is_free=False)


def distance(twin, target):
    return float((twin.compressed() - target).detach().norm())


@pytest.mark.parametrize("store", [torch.int8, INT4, INT3], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_what_codes_give_exactly_is_given_back(setting, store):
    twin = twin_of(setting, store)
    target = twin.compressed()
    project(twin, target)
    assert torch.equal(twin.compressed(), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("setting", [*SETTINGS, GROUPED], ids=str)
def test_it_is_never_farther_than_a_fit_that_is_rounded(setting, dtype):
    twin = twin_of(setting, INT3, dtype)
    target = twin.compressed() + 0.1 * torch.randn(twin.shape, dtype=dtype)
    project(twin, target)
    found = distance(twin, target)
    twin.take(setting.fit(target))
    assert found <= distance(twin, target)


def test_each_factor_makes_good_what_the_rounding_of_the_others_loses():
    twin = twin_of(SVD(rank=3), INT3)
    target = twin.compressed() + 0.02 * torch.randn(twin.shape)
    twin.take(twin.planned.fit(target))
    fitted = distance(twin, target)
    twin = twin_of(SVD(rank=3), INT3)
    project(twin, target)
    assert distance(twin, target) < 0.75 * fitted


@pytest.mark.parametrize("store", [torch.float32, torch.bfloat16], ids=str)
def test_without_codes_it_is_the_fit(store):
    twin = twin_of(SVD(rank=3), store)
    target = twin.compressed() + 0.1 * torch.randn(twin.shape)
    project(twin, target)
    assert torch.equal(twin.factors.reconstruct(), SVD(rank=3).fit(target).reconstruct())


@pytest.mark.parametrize("setting", [Sparse(density=0.2), GROUPED, LowRankSparse(rank=2, density=0.1)], ids=str)
def test_there_are_never_more_values_than_planned(setting):
    twin = twin_of(setting, INT4)
    project(twin, twin.compressed() + 0.05 * torch.randn(twin.shape))
    specs = setting.factor_specs(twin.shape, INT4)
    for name, factor in twin.stored().items():
        assert specs[name].nonzeros is None or int((factor.values != 0).sum()) <= specs[name].nonzeros
