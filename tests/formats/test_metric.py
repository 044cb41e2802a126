"""Fits in which rows count differently."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import NumericalError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.metric import Metric
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


ROWS = torch.tensor([1000.0, 100.0, 10.0, 1.0]).repeat(10)


@pytest.mark.parametrize("setting", [SVD(5), Sparse(0.2), LowRankSparse(0.15, rank=2)], ids=str)
def test_rows_that_count_more_are_kept_better(setting):
    weight, metric = torch.randn(40, 24), Metric(rows=ROWS)
    ours, plain = (
        weight - found.reconstruct().detach() for found in (metric.fit(setting, weight), setting.fit(weight))
    )
    assert metric.square(ours) < 0.8 * metric.square(plain)
    assert ours.norm() > plain.norm()
    assert metric.square(ours) == pytest.approx(float((ours.square().sum(1) * ROWS).sum()), rel=1e-5)


def test_the_best_rank_for_rows_is_reached():
    weight, sizes = torch.randn(40, 24), ROWS.sqrt()[:, None]
    error = weight - Metric(rows=ROWS).fit(SVD(5), weight).reconstruct().detach()
    tail = torch.linalg.svdvals(weight * sizes)[5:]
    assert float((error * sizes).norm()) == pytest.approx(float(tail.norm()), rel=1e-4)


def test_values_that_are_kept_stay_as_they_are():
    weight = torch.randn(40, 24)
    kept = Metric(rows=ROWS).fit(Sparse(0.3), weight).reconstruct().detach()
    torch.testing.assert_close(kept[kept != 0], weight[kept != 0])


def test_formats_that_mix_rows_are_fitted_as_if_all_counted_alike():
    weight = torch.randn(40, 24)
    found, plain = Metric(rows=ROWS).fit(TT(4), weight), TT(4).fit(weight)
    torch.testing.assert_close(found.reconstruct(), plain.reconstruct())


def test_rows_that_count_nothing_are_refused():
    with pytest.raises(NumericalError, match="positive numbers"):
        Metric(rows=torch.zeros(40)).fit(SVD(2), torch.randn(40, 24))
