"""What is told of a setting before it is fitted, against its fit."""

from __future__ import annotations

import pytest
import torch

from tcompress.formats import FORMATS
from tcompress.formats.outlook import of_unfoldings
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker
from tcompress.linalg.svd import left_out

SHAPES = [(48, 40), (24, 16, 3, 3)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lost(weight, setting):
    return float((weight - setting.fit(weight).reconstruct().detach()).square().sum() / weight.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", [SVD(3), SVD(16), SVD(99), Sparse(0.3), Sparse(0.9), Sparse(1.0)], ids=str)
def test_an_exact_outlook_is_what_the_fit_loses(shape, setting):
    weight = torch.randn(shape)
    outlook = setting.outlook(weight)
    assert outlook is not None
    assert outlook.is_exact
    assert outlook.loss(setting) == pytest.approx(lost(weight, setting), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("setting", [TT(4), TT(12), TTMatrix(3), TTMatrix(9), Tucker(4), Tucker(12)], ids=str)
def test_an_outlook_of_unfoldings_is_near_what_the_fit_loses(shape, setting):
    weight = torch.randn(shape)
    outlook = setting.outlook(weight)
    assert outlook is not None
    assert not outlook.is_exact
    assert outlook.loss(setting) == pytest.approx(lost(weight, setting), rel=0.15)


def test_a_weight_that_a_train_can_hold_is_told_to_lose_nothing():
    weight = TT(3).fit(torch.randn(64, 64)).reconstruct().detach()
    outlook = TT.outlook(weight)
    assert outlook is not None
    assert outlook.loss(TT(3)) < 1e-6
    assert outlook.loss(TT(2)) > 1e-3


def test_some_rows_of_a_large_unfolding_tell_of_all():
    matrix = torch.randn(900, 1000)
    told = of_unfoldings([matrix], lambda rank: [rank])
    for rank in (90, 300, 600):
        assert told.loss(rank) == pytest.approx(float(left_out(matrix)[rank]), rel=0.25)


@pytest.mark.parametrize("kind", FORMATS.values(), ids=lambda kind: kind.name)
def test_zeros_lose_nothing(kind):
    outlook = kind.outlook(torch.zeros(16, 16))
    setting = kind.within((16, 16), torch.float32, 512) if outlook is not None else None
    assert setting is None or outlook.loss(setting) == 0
