"""Factors of any multilinear weight, made better for a layer's OUTPUT one after the other.

Letters: T = the weight as its matrix (m, n); f = one factor; J = the map from a change of f to the change of the
rebuilt matrix, linear because the matrix is linear in every single factor; E = T - the rebuilt matrix; G, the second
moment of the input, as in output_error.

With all other factors fixed, tr(E G ET) is quadratic in f: its normal equations are JT (J d) G = JT E G. Conjugate
gradients solve them with J and JT alone, which the way from the factors to the matrix and its derivative provide:
nothing needs to be known of the format, and no matrix is inverted, so G may be singular.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.linalg.output_error import diagonal_of, output_error, times
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two

Rebuild = Callable[[Sequence[Tensor]], Tensor]

_UPDATES = 20  # of single factors, in all: rounds over two factors are cheaper than over five
_FEWEST_ROUNDS = 2
_STEPS = 4  # of conjugate gradients for one factor, before the next one is as much worth a change
_SETTLED = 1e-4  # of the error: a smaller gain of a whole round ends the search
_EXACT = 1e-7  # of the output: a smaller error is rounding
_SLIGHT = 3e-5  # of the squared error: a smaller gain ends the steps for a factor
_LEAST = 1e-6  # of the largest curvature: what entries are taken to have at least, to be divided by


@dataclass(frozen=True)
class _Problem:
    rebuild: Rebuild
    target: Tensor
    gram: Tensor
    keeps_zeros: bool
    exponent: int  # what is rebuilt is 2^-exponent of what the factors make

    def error(self, factors: Sequence[Tensor]) -> float:
        return output_error(self.target - self.rebuild(factors), self.gram)


def refine(
    rebuild: Rebuild,
    factors: Sequence[Tensor],
    target: Tensor,
    gram: Tensor,
    *,
    keeps_zeros: bool = False,
    rounds: int | None = None,
    steps: int = _STEPS,
) -> list[Tensor]:
    """Return factors with a smaller tr(E G ET): never worse than the given ones, as far as rounding can tell.

    rebuild: factors -> (m, n), linear (or, with a summand it does not enter, affine) in each of them, differentiable,
    in whatever type they have. target: (m, n), finite. gram: as in output_error, of moderate size. Several matrices may
    be one target, (N, m, n), each with a moment of its own, (N, n, n); the sum of their errors counts.
    keeps_zeros: entries that are zero stay so: the supports of sparse factors. rounds: over all factors, at most.
    """
    scaled, exponent = scaled_to_unit(target.detach())
    # Squares of values near the ends of float32 leave its range; float64 has room for those of factors.
    dtype = torch.float64 if exponent else target.dtype
    unit = _in_units(rebuild, exponent) if exponent else rebuild
    problem = _Problem(unit, scaled.to(dtype), gram.to(dtype), keeps_zeros, exponent)
    state = [factor.detach().to(dtype) for factor in factors]
    best, lowest = list(state), problem.error(state)
    exact = _EXACT * output_error(problem.target, problem.gram)
    # A single number scales the others, which scale themselves.
    movable = [position for position, factor in enumerate(state) if factor.numel() > 1]
    for _ in range(rounds or max(_FEWEST_ROUNDS, _UPDATES // max(1, len(movable)))):
        if not lowest > exact:
            break
        for position in movable:
            state[position] = _solved(problem, state, position, steps)
        error, before = problem.error(state), lowest
        if error < lowest:
            best, lowest = list(state), error
        if not before - error > _SETTLED * before:
            break
    return best


def _solved(problem: _Problem, state: Sequence[Tensor], position: int, steps: int) -> Tensor:
    """Return a better factor at one position: a few conjugate gradients from the present one."""
    factor, gram = state[position], problem.gram

    def rebuilt(candidate: Tensor) -> Tensor:
        return problem.rebuild([*state[:position], candidate, *state[position + 1 :]])

    def pulled(cotangent: Tensor) -> Tensor:
        slope = torch.autograd.grad(whole, variable, cotangent, retain_graph=True)[0]
        return torch.where(factor != 0, slope, 0) if problem.keeps_zeros else slope

    with torch.enable_grad():
        variable = factor.clone().requires_grad_()
        whole = rebuilt(variable)
    fixed = rebuilt(torch.zeros_like(factor))
    rest = problem.target - whole.detach()
    bent = times(rest, gram)
    squared_error, slope = _inner(rest, bent), pulled(bent)
    curvatures = _curvatures(problem, state, position)
    preconditioned = slope / curvatures
    direction, squares = preconditioned, _inner(slope, preconditioned)
    for _ in range(steps):
        image = rebuilt(direction) - fixed
        bent = times(image, gram)
        curvature = _inner(image, bent)
        # Along what no input has, only rounding noise would say how far to go: far.
        if not curvature > torch.finfo(gram.dtype).eps * _inner(direction, direction * curvatures):
            break
        length = squares / curvature
        gain = length * squares
        factor = torch.add(factor, direction, alpha=length)
        squared_error -= gain
        if not gain > _SLIGHT * squared_error:
            break
        slope = torch.sub(slope, pulled(bent), alpha=length)
        preconditioned = slope / curvatures
        last, squares = squares, _inner(slope, preconditioned)
        direction = torch.add(preconditioned, direction, alpha=squares / last)
    return factor if bool(factor.isfinite().all()) else state[position]


def _curvatures(problem: _Problem, state: Sequence[Tensor], position: int) -> Tensor:
    """Return about the diagonal of JT (J .) G for one factor, positive.

    The derivative by an entry is a sum of products of the others' entries; without its mixed terms, the square of it is
    the derivative of the weight rebuilt from squares. Where the sums have one term each, as in a product of two
    matrices, nothing is left out but what lies off the diagonal of G.
    """
    squares = [factor.square() for factor in state]
    gram = problem.gram
    weights = diagonal_of(gram, problem.target.shape[-1]).clamp_min(0).unsqueeze(-2)
    weights = times_power_of_two(weights, -problem.exponent)  # the unit enters squared, like the factors
    with torch.enable_grad():
        variable = squares[position].requires_grad_()
        whole = problem.rebuild(squares)
        found: Tensor = torch.autograd.grad(whole, variable, weights.expand_as(whole))[0]
    largest = float(found.max())
    return found.clamp_min(_LEAST * largest) if largest > 0 else torch.ones_like(found)


def _in_units(rebuild: Rebuild, exponent: int) -> Rebuild:
    return lambda factors: times_power_of_two(rebuild(factors), -exponent)


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dtype=torch.float64))
