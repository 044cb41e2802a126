"""Codes chosen for the layer's output, as they are stored."""

from __future__ import annotations

import pytest
import torch

from tcompress.encodings import INT3, INT4
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.metric import PLAIN, Metric
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.fitting import fit, stored_factors
from tcompress.workflow.rounding import rounded_for_output
from tcompress.workflow.stored import rebuild

CPU = torch.device("cpu")
SETTINGS = [Sparse(0.4), Sparse(1.0), Sparse(0.5, m=4), LowRankSparse(0.3, rank=3)]


@pytest.fixture
def problem():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 64, generator=random) @ torch.randn(64, 64, generator=random)
    return torch.randn(40, 64, generator=random), Metric(inputs.T @ inputs / 300)


@pytest.mark.parametrize("store", [INT3, INT4, torch.int8], ids=str)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_codes_serve_the_output_and_take_the_bytes_they_took(setting, store, problem):
    weight, metric = problem
    stored = stored_factors(metric.fit(setting, weight).state_dict(), setting, (40, 64), store)
    better = rounded_for_output(stored, setting, weight, metric)
    errors = [
        metric.square(
            weight - rebuild(setting, (40, 64), {n: f.values for n, f in each.items()}, dtype=torch.float32, device=CPU)
        )
        for each in (stored, better)
    ]
    assert errors[1] <= errors[0]
    if store != torch.int8:
        assert errors[1] < (0.8 if setting == Sparse(1.0) else 0.99) * errors[0]
    assert [f.nbytes for f in better.values()] == [f.nbytes for f in stored.values()]
    for factor in better.values():
        decoded = factor.coding.decode(factor.parts, tuple(factor.values.shape))
        assert torch.equal(decoded, factor.values)


@pytest.mark.parametrize("store", [INT3, INT4, torch.int8], ids=str)
def test_what_is_decoded_is_encoded_to_the_same_values_again(store, problem):
    weight, metric = problem
    for density in (0.2, 0.3, 0.4, 1.0):  # where no value that is stored becomes a zero, which is stored no more
        (factor,) = fit(weight, Sparse(density), store=store, device=CPU, metric=metric).stored.values()
        again = factor.coding.encode(factor.values)
        torch.testing.assert_close(factor.coding.decode(again, (40, 64)), factor.values)


def test_nothing_changes_where_nothing_is_known_or_nothing_is_coded(problem):
    weight, metric = problem
    for setting, store, known in (
        (Sparse(0.4), INT4, PLAIN),
        (Sparse(0.4), torch.float16, metric),
        (SVD(4), INT4, metric),
    ):
        stored = stored_factors(metric.fit(setting, weight).state_dict(), setting, (40, 64), store)
        same = rounded_for_output(stored, setting, weight, known)
        assert all(torch.equal(same[name].values, stored[name].values) for name in stored)
