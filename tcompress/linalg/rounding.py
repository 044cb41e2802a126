"""Rounding to grids that are given, one column after the other, each error made good by the others.

Letters: T = what is to be approximated (m, n); Q = the values on their grids; s = the distance of neighbouring grid
points, one for each entry; G = second moment of the layer's input, as in output_error; P = (T - Q) G.

With all else fixed tr((T - Q) G (T - Q)T) is least in entry (i, j) at Q_ij + P_ij / G_jj, and on the grid at the point
nearest to it: each step lowers the error or leaves it.

K. Behdin et al., "QuantEase: optimization-based quantization for language models", 2023.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 64  # columns whose part in P is brought up to date at once for all that follow


def descend_on_grid(
    target: Tensor,
    start: Tensor,
    step: Tensor,
    bounds: tuple[int, int],
    gram: Tensor,
    *,
    passes: int,
    shift: float = 0.0,
) -> Tensor:
    """Return values on the same grids as ``start`` with a smaller tr((T - Q) G (T - Q)T), never a larger one.

    target, start: (m, n). step: (m, n), zero where an entry stays as it is; others become no zeros, which would not be
    stored. bounds: least and largest code c; its point is sign(c) * (|c| - shift) steps, shift at most 1. gram: of a
    diagonal each entry is by itself; of a block, each part of a row. Computed in the type of ``target``.
    """
    shape = target.shape
    if gram.ndim == 2:
        target, start, step = (each.reshape(-1, len(gram)) for each in (target, start, step))
    smallest = 1 if shift < 1 else 2  # code that is no zero
    found = start.to(target).clone()
    step = step.to(target)
    free = step != 0
    divisor = torch.where(free, step, torch.inf)
    diagonal = gram if gram.ndim == 1 else gram.diagonal()
    weights = torch.where(diagonal > 0, diagonal, torch.inf).to(target)
    whole = gram.diag() if gram.ndim == 1 else gram.to(target)
    pull = (target - found) @ whole
    for _ in range(passes):
        for begin in range(0, found.shape[1], _BLOCK):
            columns = slice(begin, begin + _BLOCK)
            before = found[:, columns].clone()
            own = pull[:, columns].clone()
            for at in range(before.shape[1]):
                j = begin + at
                wanted = found[:, j] + own[:, at] / weights[j]
                count = wanted / divisor[:, j]
                sign = torch.where(count < 0, -1.0, 1.0).to(count)
                code = (count.abs() + shift).round().clamp_min(smallest)
                code = torch.where(count < 0, code.clamp_max(-bounds[0]), code.clamp_max(bounds[1]))
                point = torch.where(free[:, j], sign * (code - shift) * step[:, j], found[:, j])
                own.addr_(point - found[:, j], whole[j, columns], alpha=-1)
                found[:, j] = point
            pull.addmm_(found[:, columns] - before, whole[columns], alpha=-1)
    return found.reshape(shape)
