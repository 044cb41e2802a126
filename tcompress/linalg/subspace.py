"""The leading left singular vectors of a matrix and what it becomes in them: all that trains and Tucker cores need.

Letters: n, m = rows and columns of the matrix, mostly n far below m; r = rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.distance import frobenius_norm
from tcompress.linalg.eigen import symmetric_eigen
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two
from tcompress.linalg.svd import truncated_svd

FINE = 1e-6  # excess of one truncation over the best of its rank: those of all modes add up

_SMALL = 256  # rows up to which the Gram matrix is decomposed whole
_FLOAT32_DECOMPOSES = 1e-2  # of ||A||^2; a larger residual hardly feels the rounding of a float32 Gram matrix
_COLUMNS_AT_ONCE = 1 << 16  # converted to float64 at one time


def split_off(matrix: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return left (n, r), orthonormal columns, and left.T @ matrix (r, m): their product is the best of the rank.

    rank: clipped to the sizes. The right singular vectors, as long as the matrix is wide, are never made.
    Raises NumericalError as truncated_svd does.
    """
    n, m = matrix.shape
    if n > _SMALL or n > m or matrix.dtype != torch.float32:
        left, values, right = truncated_svd(matrix, rank, seed=seed, excess=FINE)
        return left, values[:, None] * right
    scaled, exponent = scaled_to_unit(matrix.detach())
    gram = scaled @ scaled.T
    left = _leading(gram, rank)
    rest = left.T @ scaled
    total = float(gram.diagonal().double().sum())
    if rank < n and total - frobenius_norm(rest) ** 2 <= _FLOAT32_DECOMPOSES * total:
        left = _leading(_exact_gram(scaled), rank)
        rest = left.T @ scaled
    if exponent:
        rest = times_power_of_two(rest, exponent)
        if not rest.isfinite().all():
            raise NumericalError(f"a projection exceeds the range of {matrix.dtype}; scale the weight down")
    return left, rest


def _leading(gram: Tensor, rank: int) -> Tensor:
    vectors = symmetric_eigen(gram.double())[1][:, -rank:].flip(1)
    signs = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return (vectors * signs).float().contiguous()


def _exact_gram(matrix: Tensor) -> Tensor:
    gram = torch.zeros(matrix.shape[0], matrix.shape[0], dtype=torch.float64, device=matrix.device)
    for columns in torch.split(matrix, _COLUMNS_AT_ONCE, dim=1):
        wide = columns.double()
        gram.addmm_(wide, wide.T)
    return gram
