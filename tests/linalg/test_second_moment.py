"""A stream's second moment is that of all its vectors at once, however it was cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tcompress.linalg import second_moment
from tcompress.linalg.second_moment import SecondMoment


def vectors(count, n, seed=0):
    return torch.randn(count, n, generator=torch.Generator().manual_seed(seed)) + 0.5


@pytest.mark.parametrize("full", [True, False])
def test_the_moment_is_that_of_all_vectors_at_once(full, monkeypatch):
    monkeypatch.setattr(second_moment, "_ROWS", 7)
    monkeypatch.setattr(second_moment, "_MIRRORED", 5)
    rows = vectors(100, 13)
    stream = SecondMoment(13, full=full)
    for piece in rows.split([1, 40, 0, 59]):
        stream.add(piece)
    found = stream.finish()
    exact = rows.double().numpy()
    wanted = exact.T @ exact / 100
    assert (found.count, found.diagonal) == (100, not full)
    np.testing.assert_allclose(found.second.numpy(), wanted if full else np.diag(wanted), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.mean.numpy(), exact.mean(axis=0), rtol=1e-12)
    assert found.second.dtype == found.mean.dtype == torch.float64
    assert torch.equal(found.second, found.second.T if full else found.second), "symmetric to the last bit"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_any_floating_type_is_taken_as_it_is(dtype):
    rows = vectors(50, 6).to(dtype)
    stream = SecondMoment(6, full=True)
    stream.add(rows)
    exact = rows.double()
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(stream.finish().second, exact.T @ exact / 50, rtol=tolerance, atol=tolerance)


def test_half_precision_does_not_overflow():
    stream = SecondMoment(2, full=True)
    stream.add(torch.full((10, 2), 6e4, dtype=torch.float16))
    assert torch.allclose(stream.finish().second, torch.full((2, 2), 6e4**2, dtype=torch.float64), rtol=1e-6)


def test_rounding_does_not_grow_with_the_number_of_vectors():
    exact = float(torch.tensor(0.1).double() ** 2)
    errors = []
    for count in (10_000, 1_000_000):
        stream = SecondMoment(3, full=True)
        stream.add(torch.full((count, 3), 0.1))
        errors.append(abs(float(stream.finish().second[0, 1]) / exact - 1))
    assert max(errors) < 1e-4
    assert errors[1] < 2 * errors[0] + 1e-7


def test_sums_stand_in_the_storage_that_is_given_and_nothing_is_zero():
    storage = torch.zeros(4, 4, dtype=torch.float64)
    stream = SecondMoment(4, full=True, storage=storage)
    stream.add(vectors(9, 4))
    found = stream.finish()
    assert found.second.data_ptr() == storage.data_ptr()
    empty = SecondMoment(4, full=False).finish()
    assert (empty.count, empty.second.tolist(), empty.mean.tolist()) == (0, [0.0] * 4, [0.0] * 4)


def test_rounding_that_differs_between_the_halves_is_evened_out(monkeypatch):
    monkeypatch.setattr(second_moment, "_MIRRORED", 3)
    storage = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = (storage + storage.T) / 2
    found = SecondMoment(8, full=True, storage=storage).finish().second
    assert torch.equal(found, wanted)
    assert torch.equal(found, found.T)
