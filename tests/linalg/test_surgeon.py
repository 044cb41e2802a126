"""The surgeon's pass against the formulas it abbreviates, one column after the other with an inverse for each."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import NumericalError
from tcompress.linalg.magnitude import keep_largest
from tcompress.linalg.output_error import output_error
from tcompress.linalg.surgeon import surgeon


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(fan_in, samples=400, seed=1):
    inputs = normal(samples, fan_in, seed=seed) @ (normal(fan_in, fan_in, seed=seed + 1) / 3 + torch.eye(fan_in))
    return inputs.T @ inputs / samples


def to_quarters(column):
    return (column * 4).round() / 4


def by_the_book(weight, gram, density, damping, round_values):
    """One block; the inverse of what is left of H is taken anew for every column."""
    n = len(gram)
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(n, dtype=gram.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(n)]
    costs = weight / torch.stack([inverse[0, 0] for inverse in inverses]).sqrt()
    mask = keep_largest(costs, int(density * weight.numel() + 0.5)) != 0
    left = weight.clone()
    for j, inverse in enumerate(inverses):
        new = torch.where(mask[:, j], round_values(left[:, j]), 0)
        left[:, j:] -= ((left[:, j] - new) / inverse[0, 0])[:, None] * inverse[0]
        left[:, j] = new
    return left


WEIGHT = normal(9, 20, seed=7)


@pytest.mark.parametrize("round_values", [None, to_quarters], ids=["free", "rounded"])
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_one_block_is_what_the_formulas_say(density, round_values):
    gram = moment_of(20)
    found = surgeon(WEIGHT, gram, density, round_values=round_values)
    expected = by_the_book(WEIGHT, gram, density, 0.01, round_values or (lambda column: column))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("block", [1, 3, 7, 20, 128])
def test_every_block_keeps_its_share(block):
    found = surgeon(WEIGHT, moment_of(20), 0.3, block=block)
    assert int((found != 0).sum()) == 54
    for start in range(0, 20, block):
        part = found[:, start : start + block]
        assert abs(int((part != 0).sum()) - 0.3 * part.numel()) <= 1


def test_with_a_mask_of_everything_blocks_change_nothing():
    gram = moment_of(20)
    first = surgeon(WEIGHT, gram, 1.0, round_values=to_quarters)
    torch.testing.assert_close(surgeon(WEIGHT, gram, 1.0, round_values=to_quarters, block=6), first)
    assert torch.equal(first, to_quarters(first))


def test_the_error_is_smaller_than_without_it():
    weight, gram = normal(40, 64, seed=2), moment_of(64)
    kept = keep_largest(weight, weight.numel() // 2)
    assert output_error(weight - surgeon(weight, gram, 0.5, block=16), gram) < 0.9 * output_error(weight - kept, gram)
    rounded = surgeon(weight, gram, 1.0, round_values=to_quarters)
    assert output_error(weight - rounded, gram) < 0.8 * output_error(weight - to_quarters(weight), gram)


def test_patterns_are_kept_in_every_group():
    found = surgeon(WEIGHT, moment_of(20), 0.5, pattern=(2, 4), block=10)
    assert bool(((found != 0).reshape(-1, 4).sum(1) == 2).all())


def test_of_inputs_that_have_nothing_in_common_it_is_pruning_by_cost():
    diagonal = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.1
    expected = torch.where(keep_largest(WEIGHT * diagonal.sqrt(), 90) != 0, WEIGHT, 0)
    for gram in (diagonal, diagonal.diag()):
        torch.testing.assert_close(surgeon(WEIGHT, gram, 0.5, damping=0.0), expected)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_singular_moments_and_dead_inputs_are_no_trouble(damping):
    gram = moment_of(20, samples=5)
    gram[:, 3] = gram[3] = 0
    found = surgeon(WEIGHT.float(), gram.float(), 0.5, damping=damping)
    assert found.isfinite().all()
    assert int((found != 0).sum()) == 90
    assert output_error(WEIGHT - found, gram) < output_error(WEIGHT - keep_largest(WEIGHT, 90), gram)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_the_size_of_the_weight_does_not_matter(size):
    gram = moment_of(20).float()
    found = surgeon(WEIGHT.float() * size, gram, 0.5, round_values=lambda column: column)
    torch.testing.assert_close(found.double() / size, surgeon(WEIGHT, gram, 0.5), rtol=1e-4, atol=1e-5)


def test_what_is_no_second_moment_is_refused_and_inputs_are_left_alone():
    with pytest.raises(NumericalError, match="second moment"):
        surgeon(WEIGHT, torch.eye(19), 0.5)
    indefinite = -torch.ones(20, 20, dtype=torch.float64) + 1.5 * torch.eye(20, dtype=torch.float64)
    with pytest.raises(NumericalError, match="negative eigenvalues"):
        surgeon(WEIGHT, indefinite * 1e3, 0.5, damping=1e-9)
    weight, gram = WEIGHT.clone(), moment_of(20)
    surgeon(weight, gram, 0.5)
    assert torch.equal(weight, WEIGHT)
    assert torch.equal(gram, moment_of(20))
