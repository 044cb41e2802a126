"""The rank that stands out from noise: empirical variational Bayesian matrix factorisation, solved globally.

S. Nakajima, M. Sugiyama, S. D. Babacan, R. Tomioka, "Global analytic solution of fully-observed variational Bayesian
matrix factorization", J. Mach. Learn. Res. 14, 2013: the threshold, the objective and its bounds.
J. Gusak et al., "Automated multi-stage compression of neural networks" (MUSCO), 2019: the weakened rank.

Letters, as in the paper: L <= M = the matrix's sides; alpha = L / M; g = singular values; s2 = variance of the noise;
x = g^2 / (M s2). A value counts where x exceeds x_low = (1 + tau_low)(1 + alpha / tau_low).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tcompress.errors import NumericalError

_GRID = 64  # variances looked at before the best one's neighbourhood is searched: the objective has several minima
_STEPS = 60  # of the search, each of which leaves 0.618 of the interval
_GOLDEN = (math.sqrt(5) - 1) / 2
_SMALLEST = float(np.finfo(np.float64).eps)  # of the largest singular value: below it all is rounding noise

Array = NDArray[np.float64]


def evbmf_rank(singular_values: Tensor, rows: int, columns: int) -> int:
    """Return how many singular values of a rows x columns matrix stand out from Gaussian noise of unknown variance.

    singular_values: at most min(rows, columns), in any order and on any scale; those not given count as zeros.
    0 means that the matrix cannot be told from noise; so it is for a matrix of one row or column, and of zeros.

    Raises NumericalError if a value is NaN or infinite.
    """
    if not singular_values.isfinite().all():
        raise NumericalError("a singular value is NaN or infinite")
    if singular_values.numel() > min(rows, columns):
        raise ValueError(f"a {rows} x {columns} matrix has at most {min(rows, columns)} singular values")
    values: Array = np.zeros(min(rows, columns))
    values[: singular_values.numel()] = singular_values.detach().to("cpu", torch.float64).reshape(-1).numpy()
    values = np.sort(values)[::-1]
    if not values[:1].any():
        return 0
    squares = (values / values[0]) ** 2
    long, alpha = max(rows, columns), min(rows, columns) / max(rows, columns)
    lowest_tau = _lowest_tau(alpha)
    threshold = (1 + lowest_tau) * (1 + alpha / lowest_tau)
    variance = _noise_variance(squares / long, alpha, threshold)
    return int(np.count_nonzero(squares > long * variance * threshold))


def weakened_rank(full: int, found: int, weakening: float = 0.8, least: int = 1) -> int:
    """Return the rank that goes only ``weakening`` of the way from the full rank down to the one found.

    A rank of 0 found says that nothing stands out, not that everything can go: the full rank is kept, as it is where
    it does not exceed the least rank.
    """
    if found == 0 or full <= least:
        return full
    return max(least, math.floor(full - weakening * (full - found) + 1e-9))  # 100 - 0.7 * 10 is 93, not 92


def _lowest_tau(alpha: float) -> float:
    """Return the zero of phi(t) + phi(t / alpha), phi(z) = log(z + 1) / z - 1/2, which falls with t.

    At the zero the objective is continuous; with the usual estimate 2.5129 sqrt(alpha) of it, it jumps.
    """

    def phi(z: float) -> float:
        return math.log1p(z) / z - 0.5

    low, high = 2.5 * alpha, 2.6  # phi(2.5129) = 0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if phi(middle) + phi(middle / alpha) > 0 else (low, middle)
    return high


def _noise_variance(x1: Array, alpha: float, threshold: float) -> float:
    """Return the variance of least free energy. x1: g^2 / M, descending, the first not zero."""
    most = min(math.ceil(len(x1) / (1 + alpha)) - 1, len(x1) - 1)  # more values than this never count
    upper = float(x1.mean())
    lower = max(float(x1[most]) / threshold, float(x1[most:].mean()), _SMALLEST**2 * float(x1[0]))
    if lower >= upper:
        return upper

    def free_energy(log_variance: float) -> float:
        """Return the sum of psi(x), without the logarithms of g^2, which do not change."""
        x = x1 * math.exp(-log_variance)
        above = x[x > threshold]
        excess = above - (1 + alpha)
        tau = (excess + np.sqrt(np.maximum(excess**2 - 4 * alpha, 0))) / 2
        gains = np.log1p(tau) + alpha * np.log1p(tau / alpha) - tau
        return float(x.sum() + gains.sum()) + len(x) * log_variance

    return math.exp(_least(free_energy, math.log(lower), math.log(upper)))


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where the function is least: the best of a grid, then a golden-section search between its neighbours."""
    grid = np.linspace(low, high, _GRID)
    best = int(np.argmin([function(float(place)) for place in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, _GRID - 1)])
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return min((low, high, float(grid[best])), key=function)
