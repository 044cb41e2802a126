"""The Tucker decomposition: sequentially truncated higher-order SVD, then higher-order orthogonal iteration.

Letters: n1..nd = sizes of the tensor; r1..rd = ranks; factor k is (n_k, r_k), its columns orthonormal; the core is
(r1, ..., rd). A mode that is not compressed has no factor: None stands in its place.

L. De Lathauwer, B. De Moor, J. Vandewalle, "On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order
tensors", SIAM J. Matrix Anal. Appl. 21 (2000): HOOI.
N. Vannieuwenhoven, R. Vandebril, K. Meerbergen, "A new truncation strategy for the higher-order singular value
decomposition", SIAM J. Sci. Comput. 34 (2012): ST-HOSVD, and why its squared errors add up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.linalg.distance import frobenius_norm
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two
from tcompress.linalg.subspace import split_off
from tcompress.linalg.svd import rank_for_error, singular_values

Factors = list[Tensor | None]
_SWEEPS = 100
_GAIN = 1e-6  # of the norm, by which a sweep must lower the error to be followed by another
_LARGE = 1 << 22  # values from which a sweep, two passes over all of them, must gain ten times as much


def tucker(tensor: Tensor, ranks: Sequence[int | None], *, seed: int = 0) -> tuple[Tensor, Factors]:
    """Return core and factors with at most these ranks; None leaves a mode as it is.

    The squared error of the start is the sum of what the truncations left out, hence at most d times the best possible;
    every sweep of HOOI lowers it. Raises NumericalError as truncated_svd does.
    """
    cut = [rank if rank is not None and rank < size else None for rank, size in zip(ranks, tensor.shape, strict=True)]
    scaled, exponent = scaled_to_unit(tensor)
    core, factors = st_hosvd(scaled, cut, seed=seed)
    if len(tensor.shape) - cut.count(None) > 1:  # with one mode truncated, that truncation was the best there is
        core, factors = _iterate(scaled, core, factors, cut, seed)
    if exponent:
        core = times_power_of_two(core, exponent)
        if not core.isfinite().all():
            raise NumericalError(f"a core exceeds the range of {tensor.dtype}; scale the weight down")
    for mode, rank in enumerate(ranks):
        if rank is not None and cut[mode] is None:  # any basis of a whole mode does: this one costs nothing
            factors[mode] = torch.eye(tensor.shape[mode], dtype=tensor.dtype, device=tensor.device)
    return core.clone() if core is tensor else core, factors


def _iterate(
    tensor: Tensor, core: Tensor, factors: Factors, ranks: Sequence[int | None], seed: int
) -> tuple[Tensor, Factors]:
    """Sweep until the error falls no more."""
    total = frobenius_norm(tensor) ** 2
    gain = _GAIN if tensor.numel() < _LARGE else 10 * _GAIN
    before = _error(core, total)
    for _ in range(_SWEEPS):
        improved = list(factors)
        candidate = _sweep(tensor, improved, ranks, seed)
        error = _error(candidate, total)
        if error > before:  # rounding, where the error is that small
            break
        core, factors = candidate, improved
        if before - error <= gain * math.sqrt(total):
            break
        before = error
    return core, factors


def st_hosvd(tensor: Tensor, ranks: Sequence[int | None], *, seed: int = 0) -> tuple[Tensor, Factors]:
    """Return core and factors by one truncation after the other, the mode that shrinks most first."""
    core, factors = tensor, [None] * tensor.ndim  # type: tuple[Tensor, Factors]
    for mode in _shrinking_first(tensor.shape, ranks):
        rank = ranks[mode]
        assert rank is not None  # noqa: S101
        factors[mode], rest = split_off(unfolding(core, mode), rank, seed=seed)
        core = _refold(rest, core.shape, mode)
    return core, factors


def ranks_for_error(tensor: Tensor, relative_error: float, modes: Iterable[int]) -> tuple[int, ...]:
    """Return ranks for these modes with which ``st_hosvd`` stays within the error; HOOI only lowers it.

    Squared errors of successive truncations add up: each mode gets an equal part of what those before it left over.
    The modes are truncated in the order in which they are given.
    """
    core = scaled_to_unit(tensor)[0]
    total = frobenius_norm(core) ** 2
    left_over, wanted, ranks = relative_error**2 * total, list(modes), []
    for position, mode in enumerate(wanted):
        matrix = unfolding(core, mode)
        values = singular_values(matrix)
        squares = float(values.square().sum())
        share = left_over / (len(wanted) - position)
        rank = max(1, rank_for_error(values, math.sqrt(share / squares))) if squares > 0 else 1
        ranks.append(rank)
        left_over -= float(values[rank:].square().sum())
        if position < len(wanted) - 1:
            core = _refold(split_off(matrix, rank)[1], core.shape, mode)
    return tuple(ranks)


def tucker_full(core: Tensor, factors: Sequence[Tensor | None]) -> Tensor:
    """Return the tensor (n1, ..., nd) that core and factors stand for."""
    grown = core
    for mode, factor in enumerate(factors):
        if factor is not None:
            grown = times(grown, factor, mode)
    return grown


def times(tensor: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Return the mode product: the mode of size n becomes m, by a matrix (m, n)."""
    before, size = math.prod(tensor.shape[:mode]), tensor.shape[mode]
    shape = (*tensor.shape[:mode], matrix.shape[0], *tensor.shape[mode + 1 :])
    if before == 1:
        return (matrix @ tensor.reshape(size, -1)).reshape(shape)
    if mode == tensor.ndim - 1:
        return (tensor.reshape(before, size) @ matrix.T).reshape(shape)
    # Not matmul: it takes another way, with other rounding, for matrices that gradients are asked of.
    return torch.bmm(matrix.expand(before, *matrix.shape), tensor.reshape(before, size, -1)).reshape(shape)


def unfolding(tensor: Tensor, mode: int) -> Tensor:
    """Return (n_mode, all others in their order)."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def usable_ranks(sizes: Sequence[int], ranks: Sequence[int], *, free: int = 1) -> tuple[int, ...]:
    """Return the ranks that matter: none above its mode, nor above what all other ranks can carry together.

    free: product of the modes that are not compressed.
    """
    kept = [min(rank, size) for rank, size in zip(ranks, sizes, strict=True)]
    while True:
        whole = math.prod(kept) * free
        smaller = [min(rank, whole // rank) for rank in kept]
        if smaller == kept:
            return tuple(kept)
        kept = smaller


def _sweep(tensor: Tensor, factors: Factors, ranks: Sequence[int | None], seed: int) -> Tensor:
    """Update every factor in place, each from the others, and return the core.

    The tensor is read twice: once without the second half of its modes, for the factors of the first, and once the
    other way round. What is left after that is small.
    """
    compressed = [mode for mode, rank in enumerate(ranks) if rank is not None]
    middle = compressed[len(compressed) // 2]
    core = tensor
    for own, others in (
        ([mode for mode in compressed if mode < middle], [mode for mode in compressed if mode >= middle]),
        ([mode for mode in compressed if mode >= middle], [mode for mode in compressed if mode < middle]),
    ):
        reduced = _project(tensor, factors, others)
        for mode in own:
            core = _project(reduced, factors, [other for other in own if other != mode])
            rank = ranks[mode]
            assert rank is not None  # noqa: S101
            factors[mode], rest = split_off(unfolding(core, mode), rank, seed=seed)
            core = _refold(rest, core.shape, mode)
    return core


def _project(tensor: Tensor, factors: Sequence[Tensor | None], modes: Sequence[int]) -> Tensor:
    """Contract modes with their factors, the one that shrinks most first."""
    sizes: list[int] = list(tensor.shape)
    for mode in _shrinking_first(sizes, [f.shape[1] if f is not None else None for f in factors], modes):
        factor = factors[mode]
        assert factor is not None  # noqa: S101
        tensor = times(tensor, factor.T, mode)
    return tensor


def _shrinking_first(
    sizes: Sequence[int], ranks: Sequence[int | None], modes: Sequence[int] | None = None
) -> list[int]:
    wanted = range(len(sizes)) if modes is None else modes
    shrinking = [(rank / sizes[mode], mode) for mode in wanted if (rank := ranks[mode]) is not None]
    return [mode for _, mode in sorted(shrinking)]


def _refold(matrix: Tensor, shape: Sequence[int], mode: int) -> Tensor:
    others = [size for position, size in enumerate(shape) if position != mode]
    return matrix.reshape(matrix.shape[0], *others).movedim(0, mode).contiguous()


def _error(core: Tensor, total: float) -> float:
    """Return the Frobenius error: of orthonormal factors, what the core does not carry."""
    return math.sqrt(max(0.0, total - frobenius_norm(core) ** 2))
