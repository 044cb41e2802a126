"""Ranks by a rule in a word, from a layer's spectrum alone.

    evbmf               as many singular values as stand out from noise (variational Bayes)
    evbmf:WEAKENING     only so much of the way from the full rank down to that one (0 to 1)
    energy:SHARE        the smallest rank that keeps so much of the squared norm (above 0, up to 1)

A rule never gives a rank below 1; the one of noise alone is the full rank, for nothing in it can go.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcompress.errors import NumericalError, UsageError
from tcompress.linalg.evbmf import evbmf_rank, weakened_rank

KNOWN = "evbmf, evbmf:WEAKENING (from 0 to 1) and energy:SHARE (above 0, up to 1)"

_ROUNDING = 1e-12  # of the squared norm: 1 - 0.9 is less than 0.1


def rank_by_rule(rule: str, spectrum: Tensor, rows: int, columns: int) -> int:
    """Return the rank, 1 to min(rows, columns), that the rule gives a rows x columns matrix.

    spectrum: its singular values, in any order; those not given count as zeros.

    Raises UsageError for a rule that is not known, NumericalError for a spectrum with NaN or infinity.
    """
    name, number = _parsed(rule)
    if name == "energy":
        return _rank_of_energy(spectrum, number)
    return weakened_rank(min(rows, columns), evbmf_rank(spectrum, rows, columns), number)


def check_rule(rule: object) -> None:
    """Raise UsageError for a rule that is not known."""
    _parsed(rule if isinstance(rule, str) else str(rule))


def _parsed(rule: str) -> tuple[str, float]:
    name, colon, text = rule.partition(":")
    try:
        number = float(text) if colon else 1.0
    except ValueError:
        number = math.nan
    if (name == "evbmf" and 0 <= number <= 1) or (name == "energy" and colon and 0 < number <= 1):
        return name, number
    raise UsageError(f"{rule!r} is no rank rule; known are {KNOWN}")


def _rank_of_energy(spectrum: Tensor, share: float) -> int:
    values = spectrum.detach().to("cpu", torch.float64).reshape(-1).abs()
    if not values.isfinite().all():
        raise NumericalError("a singular value is NaN or infinite")
    if not values.any():
        return 1
    squares = (values / values.max()).square().sort().values
    tails = squares.cumsum(0)  # summed from the smallest: what is left out, to its last digit
    allowed = (1 - share + (_ROUNDING if share < 1 else 0)) * tails[-1]
    return max(1, int((tails > allowed).sum()))
