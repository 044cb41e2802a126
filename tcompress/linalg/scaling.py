"""Powers of two, which change no digit: values brought to where they can be squared, factors to one range."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tcompress.errors import NumericalError

_SAFE_EXPONENT = 20  # entries within 2^-20..2^20 can be squared, and summed, in float32


def scaled_to_unit(matrix: Tensor) -> tuple[Tensor, int]:
    """Return ``matrix`` times 2^-exponent and the exponent, so that squares neither overflow nor underflow.

    A power of two changes no digit; where there is no need for it the matrix is not copied.
    """
    low, high = (float(bound) for bound in torch.aminmax(matrix))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NumericalError("the weight holds NaN or infinite values")
    exponent = math.frexp(max(-low, high))[1]
    if abs(exponent) <= _SAFE_EXPONENT:
        return matrix, 0
    return times_power_of_two(matrix, -exponent), exponent


def times_power_of_two(values: Tensor, exponent: int) -> Tensor:
    """Return ``values`` times 2^exponent: exact, but for overflow and underflow."""
    # In two steps, because 2^149, which the smallest float32 needs, is itself no float32.
    half = exponent // 2
    return values * math.ldexp(1.0, half) * math.ldexp(1.0, exponent - half)


def even_ranges(factors: Sequence[Tensor]) -> list[Tensor]:
    """Return the factors with powers of two moved between them: their product stays the same, to the bit.

    Decompositions leave the whole norm in one factor, which float16 cannot hold beyond 65504 though it holds the
    weight. Largest magnitudes differ by a factor of four at most afterwards. A product of zeros is returned as it is.
    """
    largest = [float(factor.abs().max()) if factor.numel() else 0.0 for factor in factors]
    if min(largest, default=0.0) == 0 or not all(map(math.isfinite, largest)):
        return list(factors)
    exponents = [math.frexp(value)[1] for value in largest]
    even, rest = divmod(sum(exponents), len(exponents))
    targets = [even + (position < rest) for position in range(len(exponents))]
    return [
        times_power_of_two(factor, target - exponent)
        for factor, target, exponent in zip(factors, targets, exponents, strict=True)
    ]
