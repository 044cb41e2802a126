"""The tensor train by successive truncated SVDs.

Letters: n1..nd = sizes of the tensor; r0..rd = ranks, r0 = rd = 1; core k is (r_{k-1}, n_k, r_k).

I. Oseledets, "Tensor-train decomposition", SIAM J. Sci. Comput. 33 (2011): TT-SVD and its error bound.
S. Holtz, T. Rohwedder, R. Schneider, "The alternating linear scheme for tensor optimization in the tensor train
format", 2012: the sweep that takes back what truncating one core before the other has cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from tcompress.linalg.distance import frobenius_norm
from tcompress.linalg.scaling import scaled_to_unit
from tcompress.linalg.subspace import split_off
from tcompress.linalg.svd import rank_for_error, singular_values

Cores = list[Tensor]


def tt_svd(tensor: Tensor, ranks: Sequence[int], *, seed: int = 0) -> Cores:
    """Return cores of at most these ranks (one between each two neighbours): orthonormal all but the last.

    The squared error is the sum of what the d - 1 truncations left out, hence at most d - 1 times the best possible
    (Oseledets 2011, theorem 2.2). Raises NumericalError as truncated_svd does.
    """
    rest, cores, before = tensor if ranks else tensor.clone(), [], 1  # a train of one core is no view of its input
    for size, rank in zip(tensor.shape[:-1], ranks, strict=True):
        left, rest = split_off(rest.reshape(before * size, -1), rank, seed=seed)
        cores.append(left.reshape(before, size, -1))
        before = left.shape[1]
    return [*cores, rest.reshape(before, tensor.shape[-1], 1)]


def ranks_for_error(tensor: Tensor, relative_error: float) -> tuple[int, ...]:
    """Return ranks with which ``tt_svd`` stays within the error, each the smallest that the ones before it allow.

    The errors of successive truncations are orthogonal, so their squares add up exactly. Each of the d - 1 gets an
    equal part of what those before it left over (Oseledets 2011 gives each the same delta, and wastes the rest).
    """
    rest = scaled_to_unit(tensor)[0]
    total = frobenius_norm(rest) ** 2
    left_over, ranks, before = relative_error**2 * total, [], 1
    for position, size in enumerate(tensor.shape[:-1]):
        matrix = rest.reshape(before * size, -1)
        values = singular_values(matrix)
        squares = float(values.square().sum())
        share = left_over / (tensor.ndim - 1 - position)
        rank = max(1, rank_for_error(values, math.sqrt(share / squares))) if squares > 0 else 1
        ranks.append(rank)
        left_over -= float(values[rank:].square().sum())
        if position < tensor.ndim - 2:
            _, rest = split_off(matrix, rank)
            before = rest.shape[0]
    return tuple(ranks)


def tt_full(cores: Sequence[Tensor]) -> Tensor:
    """Return the tensor (n1, ..., nd) that cores stand for."""
    joined = tt_chain(cores)
    return joined.reshape([core.shape[1] for core in cores])


def tt_chain(cores: Sequence[Tensor]) -> Tensor:
    """Return (r_first, n_first * ... * n_last, r_last): several cores multiplied into one."""
    joined = cores[0]
    for core in cores[1:]:
        first, _, inner = joined.shape
        joined = (joined.reshape(-1, inner) @ core.reshape(inner, -1)).reshape(first, -1, core.shape[2])
    return joined


def usable_ranks(sizes: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks that matter: none above what the modes and the next ranks on either side can carry."""
    kept = list(ranks)
    for order in (range(len(kept)), reversed(range(len(kept)))):
        for k in order:
            before = kept[k - 1] if k else 1
            after = kept[k + 1] if k + 1 < len(kept) else 1
            kept[k] = min(kept[k], before * sizes[k], after * sizes[k + 1])
    return tuple(kept)


def full_ranks(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the ranks at which every tensor of these sizes is exact."""
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))
