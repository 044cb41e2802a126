"""How a size is split into modes: balanced, and padded where its prime factors are too large for that.

Letters: n = the size; d = number of modes; p >= n = the size after padding.

A. Novikov et al., "Tensorizing neural networks", 2015: weights of dense layers as tensors of many modes.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial

_TOLERABLE = 1.25  # imbalance up to which an exact split is preferred to padding
_SMALLEST = 0.5  # the smallest mode of a padded split is at least this part of perfect balance


def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """Return ``count`` ascending modes whose product is ``size`` or, where that has large prime factors, a little more.

    Imbalance (arithmetic over geometric mean of the modes) and padding (p / n) both cost parameters. Where the most
    balanced exact split is tolerable it is taken; else the modes with the smallest product of the two. So 4096 gives
    (64, 64), 10 gives (2, 5), the prime 31 is padded to (4, 8), and 30522 = 2 * 3 * 5087 to (165, 185).
    """
    exact = _most_balanced(size, count)
    return exact if _imbalance(exact) <= _TOLERABLE else min(exact, _padded(size, count), key=partial(_cost, size))


@lru_cache(maxsize=65536)
def _padded(size: int, count: int) -> tuple[int, ...]:
    """Return the ``count`` ascending modes that hold ``size`` at the least cost, the smallest not far from the root."""
    if count == 1:
        return (size,)
    root = size ** (1 / count)
    options = (
        tuple(sorted((smallest, *_padded(-(-size // smallest), count - 1))))
        for smallest in range(max(1, math.floor(_SMALLEST * root)), math.ceil(root) + 1)
    )
    return min(options, key=partial(_cost, size))


def _cost(size: int, modes: tuple[int, ...]) -> float:
    return math.prod(modes) / size * _imbalance(modes)


def _imbalance(modes: tuple[int, ...]) -> float:
    mean = math.prod(modes) ** (1.0 / len(modes))
    return float(sum(modes) / (len(modes) * mean))


@lru_cache(maxsize=65536)
def _most_balanced(size: int, count: int) -> tuple[int, ...]:
    """Return the ``count`` ascending factors of ``size`` with the smallest sum; ones fill up what is missing."""
    if count == 1:
        return (size,)
    if count == 2:
        smallest = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
        return (smallest, size // smallest)
    least = math.floor(size ** (1 / count) + 1e-9)  # the smallest of d factors is at most the d-th root
    options = (
        tuple(sorted((smallest, *_most_balanced(size // smallest, count - 1))))
        for smallest in range(least, 0, -1)
        if size % smallest == 0
    )
    return min(options, key=sum)
