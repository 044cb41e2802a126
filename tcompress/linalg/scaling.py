"""Factors of a product brought to one range, so that a type of few exponents holds them all."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tcompress.linalg.svd import times_power_of_two


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
