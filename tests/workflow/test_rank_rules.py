"""Ranks by a rule in a word."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import NumericalError, UsageError
from tcompress.workflow.rank_rules import rank_by_rule


@pytest.fixture
def spectrum():
    """Return that of noise and four directions well above it, of a 100 x 60 matrix."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(100, 60, generator=generator)
    strong = torch.randn(100, 4, generator=generator) @ torch.randn(4, 60, generator=generator)
    return torch.linalg.svdvals(noise + 3 * strong)


def test_evbmf_finds_what_stands_out_and_a_weakening_keeps_more(spectrum):
    assert rank_by_rule("evbmf", spectrum, 100, 60) == rank_by_rule("evbmf:1", spectrum, 60, 100) == 4
    assert rank_by_rule("evbmf:0.5", spectrum, 100, 60) == 32
    assert rank_by_rule("evbmf:0.8", spectrum, 100, 60) == 15
    assert rank_by_rule("evbmf:0", spectrum, 100, 60) == 60


def test_noise_alone_keeps_its_full_rank():
    noise = torch.linalg.svdvals(torch.randn(100, 60, generator=torch.Generator().manual_seed(1)))
    assert rank_by_rule("evbmf", noise, 100, 60) == 60


@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_energy_keeps_its_share_with_the_smallest_rank(spectrum, scale):
    squares = spectrum.double().square()
    for share in (0.01, 0.5, 0.9, 0.99, 0.9999):
        rank = rank_by_rule(f"energy:{share}", spectrum * scale, 100, 60)
        assert squares[:rank].sum() >= share * squares.sum()
        assert rank == 1 or squares[: rank - 1].sum() < share * squares.sum()


def test_energy_counts_to_the_last_digit():
    assert rank_by_rule("energy:0.9", torch.tensor([3.0, 1.0]), 2, 2) == 1
    assert rank_by_rule("energy:1", torch.tensor([1e-20, 3.0, 0.0]), 3, 3) == 2
    assert rank_by_rule("energy:0.5", torch.zeros(3), 3, 3) == 1


def test_energy_refuses_what_is_no_number():
    with pytest.raises(NumericalError, match="NaN"):
        rank_by_rule("energy:0.5", torch.tensor([torch.nan]), 1, 1)


@pytest.mark.parametrize(
    "rule",
    ["", "best", "evbmf:", "evbmf:2", "evbmf:-0.1", "evbmf:nan", "energy", "energy:", "energy:0", "energy:1.1", ":1"],
)
def test_an_unknown_rule_names_the_known_ones(rule):
    with pytest.raises(UsageError, match=r"known are evbmf, evbmf:WEAKENING .* and energy:SHARE"):
        rank_by_rule(rule, torch.ones(3), 3, 3)
