"""A decomposition decomposed again: bases made orthonormal, so that a small core has all that the whole has.

Letters: n1..nd = sizes of a tensor; r1..rd = ranks of what it is given as; factor k is (n_k, r_k); k in the end of a
core's shape = a mode without a factor. A product left @ right is the case d = 2, its core the identity.

With factor k = Q_k R_k (QR) the tensor is (core x_k R_k) x_k Q_k. Orthonormal columns leave norms and singular values
as they are: those of every unfolding of the inner tensor are those of the whole one's, zeros apart, and its best
approximation times the Q_k is the whole one's. Nothing of the whole one's size is made.

J. Gusak et al., "Automated multi-stage compression of neural networks" (MUSCO), 2019: cores are compressed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tcompress.linalg.scaling import even_ranges
from tcompress.linalg.svd import truncated_svd
from tcompress.linalg.tucker import Factors, times, tucker


def inner_matrix(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return outer, core, inner in float64, of which the product is left @ right.

    left: (m, r); right: (r, n). outer: (m, min(m, r)), orthonormal columns; inner: (min(r, n), n), orthonormal rows.
    """
    outer, upper = torch.linalg.qr(left.double())
    inner, lower = torch.linalg.qr(right.double().T)
    return outer, upper @ lower.T, inner.T


def inner_tensor(core: Tensor, factors: Sequence[Tensor | None]) -> tuple[Tensor, Factors]:
    """Return core and factors in float64 that stand for the same tensor, the factors with orthonormal columns."""
    core, bases = core.double(), list[Tensor | None]()
    for mode, factor in enumerate(factors):
        if factor is None:
            bases.append(None)
            continue
        basis, upper = torch.linalg.qr(factor.double())
        bases.append(basis)
        core = times(core, upper, mode)
    return core, bases


def lowered_matrix(parts: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return left (m, r) and right (r, n) of the best approximation of this rank, float64.

    parts: of ``inner_matrix``. Both factors have the square root of the singular values, as ``svd`` stores them.
    Raises NumericalError as ``truncated_svd``.
    """
    outer, core, inner = parts
    left, values, right = truncated_svd(core, rank)
    root = values.sqrt()
    return outer @ (left * root), (root[:, None] * right) @ inner


def lowered_tensor(core: Tensor, bases: Sequence[Tensor | None], ranks: Sequence[int | None]) -> list[Tensor]:
    """Return core and factors with at most these ranks, float64, in one range: by ST-HOSVD and HOOI of the core.

    core, bases: of ``inner_tensor``. Raises NumericalError as ``tucker``.
    """
    smaller, turns = tucker(core, ranks)
    factors = [basis @ turn for basis, turn in zip(bases, turns, strict=True) if basis is not None and turn is not None]
    return even_ranges([smaller, *factors])
