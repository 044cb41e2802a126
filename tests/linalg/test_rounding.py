"""Values moved along their grids."""

from __future__ import annotations

import itertools

import pytest
import torch

from tcompress.linalg.rounding import descend_on_grid


def error(target, found, gram):
    rest = (target - found).double()
    return float((rest @ gram.double() * rest).sum())


def problem(rows, columns, seed=0):
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, columns, generator=random) @ torch.randn(columns, columns, generator=random)
    target = torch.randn(rows, columns, generator=random)
    step = 0.3 + torch.rand(rows, 1, generator=random).expand(rows, columns)
    start = (target / step).round().clamp(-8, 7) * step
    start = torch.where(start == 0, step, start)
    return target, start, step.contiguous(), inputs.T @ inputs / 200


def test_correlated_inputs_make_good_what_rounding_does():
    target, start, step, gram = problem(20, 150)
    errors = [
        error(target, descend_on_grid(target, start, step, (-8, 7), gram, passes=passes), gram) for passes in range(4)
    ]
    assert errors[0] == pytest.approx(error(target, start, gram))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.3 * errors[0]


def test_everything_stays_on_its_grid_and_within_bounds():
    target, start, step, gram = problem(9, 70)
    step[:, ::3] = 0
    found = descend_on_grid(3 * target, start, step, (-8, 7), gram, passes=2)
    assert torch.equal(found[:, ::3], start[:, ::3])
    codes = found[:, 1::3] / step[:, 1::3]
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes.min() >= -8.001
    assert codes.max() <= 7.001
    assert not (codes.round() == 0).any()


@pytest.mark.parametrize("shift", [-1.0, 0.5, 1.0])
def test_grids_that_are_shifted_are_kept_to_without_a_zero(shift):
    target, _, step, gram = problem(9, 70)
    start = torch.where(target < 0, -1, 1) * (2 - shift) * step
    found = descend_on_grid(target, start, step, (-5, 4), gram, passes=2, shift=shift)
    codes = (found / step).abs() + shift
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert codes[found < 0].max() <= 5.001
    assert codes[found > 0].max() <= 4.001
    assert codes.min() >= (1.999 if shift == 1 else 0.999)
    assert error(target, found, gram) < 0.5 * error(target, start, gram)


def test_a_single_row_of_few_values_comes_near_the_best_of_all_grid_points():
    target, start, step, gram = problem(1, 4, seed=3)
    found = error(target, descend_on_grid(target, start, step, (-2, 2), gram, passes=20), gram)
    points = [
        error(target, torch.tensor([codes]) * step, gram)
        for codes in itertools.product([-2.0, -1.0, 1.0, 2.0], repeat=4)
    ]
    assert min(points) - 1e-6 <= found <= sorted(points)[len(points) // 20]


def test_a_block_says_of_each_part_of_a_row_what_the_whole_says():
    target, start, step, gram = problem(6, 24)
    block = gram[:8, :8].contiguous()
    whole = torch.block_diag(block, block, block)
    one, other = (descend_on_grid(target, start, step, (-8, 7), each, passes=2) for each in (block, whole))
    torch.testing.assert_close(one, other)
    assert not torch.equal(one, start)


def test_inputs_that_are_apart_need_no_more_than_rounding():
    target, _, step, _ = problem(6, 40)
    start = (target / step).round().clamp(-8, 7)
    start = torch.where(start == 0, torch.where(target < 0, -1.0, 1.0), start) * step
    for gram in (torch.rand(40) + 0.1, torch.diag(torch.rand(40) + 0.1)):
        torch.testing.assert_close(descend_on_grid(target, start, step, (-8, 7), gram, passes=2), start)
