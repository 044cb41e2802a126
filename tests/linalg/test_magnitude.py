"""Selection by magnitude against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tcompress.linalg.magnitude import (
    coarse_counts,
    inside_bin,
    keep_in_groups,
    keep_largest,
    smallest_count_for_error,
    threshold_bin,
    threshold_of,
)

matrices = arrays(
    np.float32, array_shapes(min_dims=1, max_dims=2, max_side=30), elements=st.floats(-100, 100, width=32)
)


@given(values=matrices, part=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_exactly_count_values_survive_and_none_dropped_is_larger(values, part):
    count = int(part * values.size)
    kept = keep_largest(torch.from_numpy(values), count).numpy()
    survives = kept == values
    assert np.all((kept == 0) | survives)
    assert np.count_nonzero(kept) == min(
        count, np.count_nonzero(np.sort(np.abs(values).ravel())[values.size - count :])
    )
    if 0 < count < values.size:
        assert np.abs(kept[kept != 0]).min(initial=np.inf) >= np.abs(values[kept == 0]).max(initial=0)


def test_the_smallest_count_is_that_of_a_loop():
    values = torch.randn(500, generator=torch.Generator().manual_seed(0))
    squares = values.double().square().sort().values
    for error in (0.9, 0.3, 0.05):
        counts = [k for k in range(501) if squares[: 500 - k].sum() <= error**2 * squares.sum()]
        assert smallest_count_for_error(values, error) == min(counts)


def test_the_smallest_count_crosses_blocks():
    values = torch.full((3, 1 << 20), 0.5)
    assert smallest_count_for_error(values, 0.5) == pytest.approx(0.75 * values.numel(), abs=2)


def test_counts_find_any_threshold_exactly():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.randint(-30, 30, (5000,))
    order = values.abs().sort(descending=True).values
    for count in (1, 17, 2500, 5000):
        coarse, above = threshold_bin(coarse_counts(values), count)
        patterns, counts = inside_bin(values, coarse)
        fine = np.zeros(1 << 15, dtype=np.int64)
        fine[patterns] = counts
        position, above_fine = threshold_bin(fine, count - above)
        threshold = order[count - 1]
        assert above + above_fine == int((order > threshold).sum())
        assert fine[position] == int((order == threshold).sum())
        assert torch.tensor((coarse << 15) | position, dtype=torch.int32).view(torch.float32) == threshold


@pytest.mark.parametrize("kind", ["normal", "constant", "few values", "mostly zero", "heavy tail"])
@pytest.mark.parametrize("minus", [False, True])
def test_the_sampled_threshold_is_that_of_sorting(kind, minus):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(400_000, generator=generator)
    values = {
        "normal": values,
        "constant": torch.full_like(values, -0.5),
        "few values": values.round(),
        "mostly zero": torch.where(values > 2.5, values, 0),
        "heavy tail": values**9,
    }[kind]
    other = torch.randn(400_000, generator=generator) if minus else None
    order = (values if other is None else values - other).abs().sort(descending=True).values
    for count in (1, 2, 1000, 200_000, 399_999, 400_000):
        threshold, ties = threshold_of(values, count, other)
        assert threshold == float(order[count - 1])
        assert ties == count - int((order > order[count - 1]).sum())


def test_groups_keep_their_largest_and_the_first_of_equals():
    matrix = torch.tensor([[1.0, -3.0, 2.0, 0.5, 1.0, 1.0, -1.0, 1.0]])
    assert torch.equal(keep_in_groups(matrix, 2, 4), torch.tensor([[0.0, -3.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0]]))
    assert not keep_in_groups(matrix, 0, 4).any()
    assert torch.equal(keep_in_groups(matrix, 4, 4), matrix)
