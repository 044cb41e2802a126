"""The rank that stands out from noise: planted ranks, noise alone, and what must not matter."""

from __future__ import annotations

import math

import pytest
import torch

from tcompress.errors import NumericalError
from tcompress.linalg.evbmf import evbmf_rank, weakened_rank

SIZES = [(200, 200), (400, 120), (120, 400), (1000, 60), (64, 640)]


def planted(rows, columns, rank, signal=3.0, seed=0):
    """Return the spectrum of unit noise plus ``rank`` directions, the weakest ``signal`` times what noise reaches."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(torch.randn(rows, max(rank, 1), generator=generator, dtype=torch.float64)).Q[:, :rank]
    right = torch.linalg.qr(torch.randn(columns, max(rank, 1), generator=generator, dtype=torch.float64)).Q[:, :rank]
    strengths = signal * (math.sqrt(rows) + math.sqrt(columns)) * torch.linspace(1, 2, rank, dtype=torch.float64)
    return torch.linalg.svdvals(noise + left * strengths @ right.T)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
@pytest.mark.parametrize("rank", [1, 3, 10])
def test_a_planted_rank_is_found_exactly(rows, columns, rank):
    for seed in range(3):
        assert evbmf_rank(planted(rows, columns, rank, seed=seed), rows, columns) == rank


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_noise_alone_has_rank_zero(rows, columns):
    assert [evbmf_rank(planted(rows, columns, 0, seed=seed), rows, columns) for seed in range(5)] == [0] * 5


@pytest.mark.parametrize("scale", [1e-200, 1e-20, 1 / 3, 1e20, 1e200])
def test_neither_scale_nor_orientation_nor_order_matters(scale):
    spectrum = planted(300, 100, 7, signal=1.3)
    found = evbmf_rank(spectrum, 300, 100)
    assert found > 0
    assert evbmf_rank(spectrum * scale, 300, 100) == evbmf_rank(spectrum.flip(0), 100, 300) == found


def test_float32_spectra_do_as_well():
    assert evbmf_rank(planted(200, 100, 5).float() * 1e-30, 200, 100) == 5


def test_a_matrix_without_noise_has_its_own_rank():
    spectrum = torch.tensor([5.0, 3.0, 1e-3])
    assert evbmf_rank(spectrum, 40, 30) == evbmf_rank(torch.nn.functional.pad(spectrum, (0, 27)), 40, 30) == 3


@pytest.mark.parametrize(
    ("values", "rows", "columns"), [([0.0] * 5, 5, 9), ([], 5, 9), ([7.0], 1, 30), ([7.0], 30, 1), ([2.0], 1, 1)]
)
def test_zeros_and_single_rows_cannot_be_told_from_noise(values, rows, columns):
    assert evbmf_rank(torch.tensor(values), rows, columns) == 0


def test_equal_values_are_noise():
    assert evbmf_rank(torch.ones(64), 64, 64) == 0


def test_what_is_no_spectrum_is_refused():
    with pytest.raises(NumericalError, match="NaN"):
        evbmf_rank(torch.tensor([1.0, torch.nan]), 2, 2)
    with pytest.raises(ValueError, match="at most 2"):
        evbmf_rank(torch.ones(3), 2, 5)


def test_the_same_spectrum_gives_the_same_rank():
    spectrum = planted(256, 256, 20, signal=1.05)
    assert len({evbmf_rank(spectrum.clone(), 256, 256) for _ in range(3)}) == 1


def test_a_weakened_rank_goes_part_of_the_way():
    assert weakened_rank(100, 50) == 60
    assert weakened_rank(100, 90, 0.7) == 93
    assert weakened_rank(100, 50, 1.0) == 50
    assert weakened_rank(100, 50, 0.0) == 100
    assert weakened_rank(100, 0) == 100
    assert weakened_rank(10, 1, 1.0, least=8) == 8
    assert weakened_rank(6, 1, least=8) == 6
