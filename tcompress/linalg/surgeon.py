"""Pruning and rounding in one pass over the columns, each error made good by the columns that follow.

Letters: W = the weight as its matrix (m, n); G = the second moment of its input, as in output_error;
H = G + a part of its mean diagonal; U = the upper triangle with UT U = H^-1, so that U_jj^2 is the j-th diagonal entry
of the inverse of what H is for the inputs j, j + 1, ..., n.

Setting w_j to q costs (w_j - q)^2 / U_jj^2, if all later columns then move by -(w_j - q) U_jk / U_jj.

B. Hassibi, D. Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1993.
E. Frantar, D. Alistarh, "SparseGPT: massive language models can be accurately pruned in one-shot", 2023.
E. Frantar et al., "GPTQ: accurate post-training quantization for generative pre-trained transformers", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.magnitude import keep_in_groups, keep_largest
from tcompress.linalg.output_error import require_moment, whole_of
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two

Rounding = Callable[[Tensor], Tensor]

_LEAST_DAMPING = 1e-8  # of the mean diagonal, where H turns out to be singular; then ten times as much each time
_TRIALS = 9


def surgeon(
    weight: Tensor,
    gram: Tensor,
    density: float,
    *,
    damping: float = 0.01,
    block: int = 128,
    round_values: Rounding | None = None,
    pattern: tuple[int, int] | None = None,
) -> Tensor:
    """Return W pruned to a fraction ``density`` of its values, the rest moved to keep the layer's output.

    weight: (m, n), finite. density: of every block of so many columns, as nearly as whole numbers allow; which values
    is chosen where the block begins, over all its rows. pattern: (k, size) keeps k of every ``size`` neighbours of a
    row instead, n a multiple of size. round_values: what values become when they are stored, given one column (m, 1)
    at a time, pruned entries zero; what it returns for those does not matter.

    Raises NumericalError when ``gram`` is no second moment, or the weight is not finite.
    """
    require_moment(gram, weight.shape[1])
    scaled, exponent = scaled_to_unit(weight.detach())
    # A rounding knows the weight's own scale.
    rounding = round_values if round_values is None or not exponent else _at_scale(round_values, exponent)
    left = scaled.to(torch.float64, copy=True)
    n = weight.shape[1]
    upper = _triangle(whole_of(gram.to(left), n), damping)
    size = pattern[1] if pattern else 1
    block = max(1, block // size) * size
    kept = 0
    for start in range(0, n, block):
        end = min(start + block, n)
        until_here = math.floor(density * weight.shape[0] * end + 0.5)
        mask = _mask(left[:, start:end], upper[start:end, start:end], until_here - kept, pattern)
        kept = until_here
        errors = _through_block(left[:, start:end], upper[start:end, start:end], mask, rounding, scaled.dtype)
        left[:, end:] -= errors @ upper[start:end, end:]
    found = left.to(weight.dtype)
    return times_power_of_two(found, exponent) if exponent else found


def _through_block(
    values: Tensor, upper: Tensor, mask: Tensor, rounding: Rounding | None, dtype: torch.dtype
) -> Tensor:
    """Prune and round the columns of a block in place; return their errors over U_jj, (m, columns)."""
    errors = torch.zeros_like(values)
    for j in range(values.shape[1]):
        column = values[:, j : j + 1]
        kept = torch.where(mask[:, j : j + 1], column, 0)
        if rounding is not None:
            kept = torch.where(mask[:, j : j + 1], rounding(kept.to(dtype)).to(kept), 0)
        errors[:, j : j + 1] = (column - kept) / upper[j, j]
        values[:, j + 1 :].addmm_(errors[:, j : j + 1], upper[j : j + 1, j + 1 :], alpha=-1)
        values[:, j : j + 1] = kept
    return errors


def _mask(values: Tensor, upper: Tensor, count: int, pattern: tuple[int, int] | None) -> Tensor:
    """Return which values of a block stay: those that cost most to lose."""
    costs = values / upper.diagonal()
    if pattern is None:
        return keep_largest(costs, count) != 0
    return keep_in_groups(costs.contiguous(), *pattern) != 0


def _triangle(gram: Tensor, damping: float) -> Tensor:
    """Return U for a second moment: (n, n) float64. More damping than asked for is added where H would be singular.

    An input that is always zero has the damping alone on the diagonal: its weights cost next to nothing.
    """
    mean = float(gram.diagonal().mean())
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    whole = (gram + gram.T) / 2
    for trial in range(_TRIALS):
        amount = damping if trial == 0 else max(damping, _LEAST_DAMPING) * 10.0 ** (trial - 1)
        lower, failed = torch.linalg.cholesky_ex(whole + amount * mean * identity)
        if not failed:
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(upper.isfinite().all()) and bool((upper.diagonal() > 0).all()):
                return upper
    raise NumericalError("the second moment of the input has negative eigenvalues")


def _at_scale(rounding: Rounding, exponent: int) -> Rounding:
    def rounded(column: Tensor) -> Tensor:
        return times_power_of_two(rounding(times_power_of_two(column, exponent)), -exponent)

    return rounded
