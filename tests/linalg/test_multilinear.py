"""Factors refined for an output: against closed forms and explicit least squares, and never worse than at first."""

from __future__ import annotations

import math

import pytest
import torch

from tcompress.linalg.multilinear import refine
from tcompress.linalg.output_error import output_error


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(fan_in, samples=200, seed=1):
    inputs = normal(samples, fan_in, seed=seed) @ (normal(fan_in, fan_in, seed=seed + 1) / 4 + torch.eye(fan_in))
    return inputs.T @ inputs / samples


def product(factors):
    left, right = factors
    return left @ right


def start_of(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return [left[:, :rank] * root, root[:, None] * right[:rank]]


TARGET = normal(14, 10, seed=9)


@pytest.mark.parametrize("kind", ["full", "diagonal", "rank-deficient"])
def test_two_factors_reach_the_best_of_their_rank(kind):
    gram = moment_of(10, samples=6 if kind == "rank-deficient" else 200)
    gram = gram.diagonal().clone() if kind == "diagonal" else gram
    whole = gram.diag() if kind == "diagonal" else gram
    values, vectors = torch.linalg.eigh(whole)
    best = float(torch.linalg.svdvals(TARGET @ (vectors * values.clamp_min(0).sqrt()))[3:].norm())
    found = refine(product, start_of(TARGET, 3), TARGET, gram, rounds=200, steps=10)
    assert output_error(TARGET - product(found), gram) == pytest.approx(best, rel=0.01)


def test_one_factor_alone_is_weighted_least_squares():
    basis, gram = normal(10, 4, seed=3), moment_of(10)

    def rebuild(factors):
        return (factors[0].reshape(14, 4)) @ basis.T

    (found,) = refine(rebuild, [torch.zeros(56, dtype=torch.float64)], TARGET, gram, rounds=30, steps=8)
    exact = torch.linalg.solve(basis.T @ gram @ basis, basis.T @ gram @ TARGET.T).T
    best = output_error(TARGET - exact @ basis.T, gram)
    assert output_error(TARGET - rebuild([found]), gram) == pytest.approx(best, rel=1e-4)


def test_a_summand_beside_the_factor_stays():
    gram, constant = moment_of(10), normal(14, 10, seed=4)
    found = refine(lambda f: f[0] @ f[1] + constant, start_of(TARGET, 2), TARGET + constant, gram)
    alone = refine(product, start_of(TARGET, 2), TARGET, gram)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_zeros_are_kept_where_they_are_asked_to():
    gram = moment_of(10)
    start = [factor * (factor.abs() > 0.4) for factor in start_of(TARGET, 8)]
    found = refine(product, start, TARGET, gram, keeps_zeros=True)
    assert all(bool((after[before == 0] == 0).all()) for before, after in zip(start, found, strict=True))
    assert output_error(TARGET - product(found), gram) < 0.9 * output_error(TARGET - product(start), gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e2, 1e6, 1e12])
def test_no_moment_makes_it_worse_or_infinite(condition, dtype):
    directions = torch.linalg.qr(normal(10, 10, seed=5)).Q
    gram = (directions * torch.logspace(0, -math.log10(condition), 10, dtype=torch.float64)) @ directions.T
    start = [factor.to(dtype) for factor in start_of(TARGET, 3)]
    found = refine(product, start, TARGET.to(dtype), gram.to(dtype), rounds=20)
    assert all(bool(factor.isfinite().all()) for factor in found)
    errors = [output_error(TARGET - product([f.double() for f in factors]), gram) for factors in (start, found)]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_size_of_the_weight_does_not_matter(size):
    gram, target = moment_of(10).float(), TARGET.float() * size
    start = [(factor * math.sqrt(size)).float() for factor in start_of(TARGET, 3)]
    found = product([factor.double() for factor in refine(product, start, target, gram)])
    expected = product(refine(product, start_of(TARGET, 3), TARGET, gram.double()))
    torch.testing.assert_close(found / size, expected, rtol=1e-3, atol=1e-3)


def test_nothing_moves_where_nothing_is_left_to_gain():
    gram = moment_of(10)
    start = start_of(TARGET, 10)
    assert all(torch.equal(a, b) for a, b in zip(start, refine(product, start, TARGET, gram), strict=True))
    zeros = [torch.zeros(14, 2), torch.zeros(2, 10)]
    assert not torch.cat([f.flatten() for f in refine(product, zeros, torch.zeros(14, 10), gram.float())]).any()


def test_what_is_given_is_left_alone():
    start, gram = start_of(TARGET, 3), moment_of(10)
    before = [factor.clone() for factor in (*start, gram)]
    first, second = (refine(product, start, TARGET, gram) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(before, (*start, gram), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
