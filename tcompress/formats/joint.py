"""joint: the weights of several layers as one tensor of one order more, its factors stored once.

Letters: N = members; out, in as in base; k = values of the kernel; n, p, q = ranks of the modes N, out, in.
tucker: W_l = sum over n, p, q of mix_l[n] core[n, p, q, k] out_basis[out, p] in_basis[in, q].
svd: W_l = left_l right, the rows of right a basis that all members share (their outputs stacked).
Every member enters with norm 1, or one large layer would take all of the rank; its norm is in mix or left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError, NumericalError
from tcompress.formats.base import (
    Factorization,
    Shape,
    largest,
    listed,
    matrix_of,
    require_count,
    require_matrix_like,
    take_factors,
)
from tcompress.formats.grouped import GroupFormat, Specs
from tcompress.formats.metric import Metric
from tcompress.formats.search import smallest_within
from tcompress.formats.staged import StagedFactorization, Stages
from tcompress.formats.svd import SVD, LowRankMatrix
from tcompress.formats.together import Fit, error_together, of_inputs, refined_together, unit_metrics
from tcompress.formats.tucker import Tucker
from tcompress.linalg.distance import compare, frobenius_norm
from tcompress.linalg.output_error import best_in_metric
from tcompress.linalg.scaling import even_ranges, scaled_to_unit, times_power_of_two
from tcompress.linalg.svd import truncated_svd
from tcompress.linalg.tucker import tucker, usable_ranks

METHODS = ("tucker", "svd")
_LEAST = 1e-6  # of the largest size of a row: what others are taken to have at least, to be divided by


@dataclass(frozen=True)
class Joint(GroupFormat):
    """Partial Tucker over layers, outputs and inputs with ``rank`` at most in each, or ``ranks`` n, p, q.

    method: tucker; or svd, one basis of the inputs for all members, which has a single rank.
    """

    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    method: str = "tucker"

    name: ClassVar[str] = "joint"
    summary: ClassVar[str] = "layers of one shape as one tensor, factors stored once (joint Tucker, shared basis)"
    rebuild: ClassVar[str] = (
        "einsum(n,npqk,op,iq->oik; mix,core,out_basis,in_basis).reshape(shape); svd: (left @ right).reshape(shape)"
    )
    reference: ClassVar[str] = "Kossaifi et al. 2019 (T-Net); svd: Wang et al. 2024 (Basis Sharing)"
    size_option: ClassVar[str] = "rank"
    quick: ClassVar[bool] = False
    alternatives = (SVD, Tucker)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise FormatError(f"joint: method is one of {', '.join(METHODS)}, got {self.method!r}")
        if (self.rank is None) == (self.ranks is None):
            raise FormatError("joint: give one of rank and ranks")
        if self.rank is not None:
            require_count(self.name, "rank", self.rank)
            return
        if self.method == "svd" or type(self.ranks) is not tuple or len(self.ranks) != 3:
            raise FormatError(f"joint: ranks are three, of layers, outputs and inputs, for tucker; got {self.ranks!r}")
        for rank in self.ranks:
            require_count(self.name, "ranks", rank)

    def group_specs(self, shape: Shape, dtype: torch.dtype, members: int) -> tuple[Specs, Specs]:
        require_matrix_like(self.name, shape)
        if self.method == "svd":
            r = self._basis_rank(shape, members)
            return {"right": FactorSpec((r, math.prod(shape[1:])), dtype)}, {"left": FactorSpec((shape[0], r), dtype)}
        n, p, q = self.clipped(shape, members)
        shared = {
            "core": FactorSpec((n, p, q, math.prod(shape[2:])), dtype),
            "out_basis": FactorSpec((shape[0], p), dtype),
            "in_basis": FactorSpec((shape[1], q), dtype),
        }
        return shared, {"mix": FactorSpec((n,), dtype)}

    def clipped(self, shape: Shape, members: int) -> tuple[int, ...]:
        """Return the Tucker ranks really used."""
        asked = self.ranks or (self.rank or 1,) * 3
        return usable_ranks((members, *shape[:2]), asked, free=math.prod(shape[2:]))

    def _basis_rank(self, shape: Shape, members: int) -> int:
        return min(self.rank or 1, members * shape[0], math.prod(shape[1:]))

    def notes(self, shape: Shape) -> tuple[str, ...]:
        most = math.prod(shape[1:]) if self.method == "svd" else max(shape[:2])
        if self.rank is not None:
            return (f"rank {self.rank} is clipped to {most}",) if self.rank > most else ()
        _, p, q = ranks = self.ranks or (0, 0, 0)
        exceed = p > shape[0] or q > shape[1]
        return (f"ranks {listed(ranks)} are clipped to {shape[0]} and {shape[1]}",) if exceed else ()

    def fit_together(self, weights: Sequence[Tensor], metrics: Sequence[Metric] = ()) -> Fit:
        plain, shape = self._fit(weights), tuple(weights[0].shape)
        if all(metric.is_plain for metric in metrics):
            return plain
        units, starts = unit_metrics(weights, metrics), [plain]
        if self.method == "svd":
            starts.append(_basis_for_outputs(weights, units, self._basis_rank(shape, len(weights))))

        def load(factors: Mapping[str, Tensor]) -> Factorization:
            return self.load(shape, factors)

        best = min(starts, key=lambda found: error_together(load, found, weights, units))
        return refined_together(load, best, weights, units)

    def _fit(self, weights: Sequence[Tensor]) -> Fit:
        shape = tuple(weights[0].shape)
        norms = [frobenius_norm(weight) for weight in weights]
        scaled = [
            (weight.double() / (norm or 1.0)).to(weight.dtype).reshape(*shape[:2], -1)
            for weight, norm in zip(weights, norms, strict=True)
        ]
        stack = torch.stack(scaled)  # (N, out, in, k)
        if self.method == "svd":
            return _shared_basis(stack, norms, self._basis_rank(shape, len(weights)))
        ranks = self.clipped(shape, len(weights))
        core, (rows, out_basis, in_basis, _) = tucker(stack, [*ranks, None])
        assert rows is not None  # noqa: S101
        assert out_basis is not None  # noqa: S101
        assert in_basis is not None  # noqa: S101
        mixes = torch.stack([row.double() * norm for row, norm in zip(rows, norms, strict=True)])
        core, out_basis, in_basis, mixes = _in_range([core, out_basis, in_basis, mixes], rows.dtype)
        return {"core": core, "out_basis": out_basis, "in_basis": in_basis}, [{"mix": mix} for mix in mixes.unbind()]

    @classmethod
    def within_together(
        cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, members: int, **options: Any
    ) -> Self | None:
        def fits(rank: int) -> bool:
            return rank == 0 or cls(**{**options, "rank": rank}).group_bytes(shape, dtype, members) <= budget_bytes

        rank = largest(fits, cls(**{**options, "rank": 1})._most(shape, members))
        return cls(**{**options, "rank": rank}) if rank else None

    @classmethod
    def reaching_together(cls, weights: Sequence[Tensor], relative_error: float, **options: Any) -> Self:
        shape = tuple(weights[0].shape)

        def reaches(rank: int) -> bool:
            setting = cls(**{**options, "rank": rank})
            shared, own = setting.fit_together(weights)
            return all(
                compare(weight, setting.load(shape, {**shared, **each}).reconstruct().detach())[1] <= relative_error
                for weight, each in zip(weights, own, strict=True)
            )

        most = cls(**{**options, "rank": 1})._most(shape, len(weights))
        return cls(**{**options, "rank": smallest_within(reaches, most)})

    def _most(self, shape: Shape, members: int) -> int:
        require_matrix_like(self.name, shape)
        if self.method == "svd":
            return min(members * shape[0], math.prod(shape[1:]))
        return max(members, *shape[:2])

    def richer(self, shape: Shape) -> Self | None:
        if self.method == "svd":
            return replace(self, rank=(self.rank or 1) + 1) if (self.rank or 1) < self._most(shape, 1) else None
        if self.clipped(shape, 1) == usable_ranks((1, *shape[:2]), (1, *shape[:2]), free=math.prod(shape[2:])):
            return None
        if self.rank is not None:
            return replace(self, rank=self.rank + 1)
        return replace(self, ranks=tuple(rank + 1 for rank in self.ranks or ()))

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        if self.method == "svd":
            left, right = take_factors(self.name, factors, "left", "right")
            if left.ndim != 2 or left.shape[0] != shape[0] or right.shape != (left.shape[1], math.prod(shape[1:])):
                raise FormatError(f"joint: factors {tuple(left.shape)} and {tuple(right.shape)} do not make {shape}")
            return LowRankMatrix(shape, left, right)
        names = ("mix", "core", "out_basis", "in_basis")
        mix, core, out_basis, in_basis = take_factors(self.name, factors, *names)
        found = [tuple(factor.shape) for factor in (mix, core, out_basis, in_basis)]
        n, p, q = core.shape[:3] if core.ndim == 4 else (0, 0, 0)
        # Ranks above the sizes gain nothing, and a small file could ask for much memory with them.
        if (
            0 in (n, p, q)
            or p > shape[0]
            or q > shape[1]
            or found != [(n,), (n, p, q, math.prod(shape[2:])), (shape[0], p), (shape[1], q)]
        ):
            raise FormatError(f"joint: factors {', '.join(names)} of shapes {found} do not make {shape}")
        return JointMember(shape, mix, core, out_basis, in_basis)


class JointMember(StagedFactorization):
    """mix: (n,); core: (n, p, q, k), out_basis: (out, p), in_basis: (in, q), the last three those of all members."""

    def __init__(self, shape: Shape, mix: Tensor, core: Tensor, out_basis: Tensor, in_basis: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.mix, self.core = nn.Parameter(mix), nn.Parameter(core)
        self.out_basis, self.in_basis = nn.Parameter(out_basis), nn.Parameter(in_basis)

    def reconstruct(self) -> Tensor:
        stages = self.stages()
        middle = stages.middle.reshape(*stages.middle.shape[:2], -1)  # (p, q, k)
        whole = torch.einsum("pqk,qi->pik", middle, self.in_basis.T)
        return (self.out_basis @ whole.flatten(1)).reshape(self.shape)

    def stage_ranks(self) -> tuple[int, int | None]:
        return self.out_basis.shape[1], self.in_basis.shape[1]

    def stages(self) -> Stages:
        middle = torch.tensordot(self.mix, self.core, dims=1)
        return Stages(self.out_basis, middle.reshape(*middle.shape[:2], *self.shape[2:]), self.in_basis.T)


def _shared_basis(stack: Tensor, norms: Sequence[float], rank: int) -> Fit:
    """Return the shared rows and each member's coefficients, from the SVD of the outputs stacked: (N * out, in * k)."""
    members, out = stack.shape[:2]
    left, values, right = truncated_svd(stack.reshape(members * out, -1), rank)
    root = values.sqrt()
    parts = (left * root).reshape(members, out, -1)
    lefts = torch.stack([part.double() * norm for part, norm in zip(parts, norms, strict=True)])
    right, lefts = _in_range([root[:, None] * right, lefts], left.dtype)
    return {"right": right}, [{"left": part} for part in lefts.unbind()]


def _basis_for_outputs(weights: Sequence[Tensor], metrics: Sequence[Metric], rank: int) -> Fit:
    """Return what is best if all inputs were alike but for their size: the rows that a mean metric asks for.

    Where rows count, each in its own way, it is the best of all.
    """
    dtype, out, fan_in = weights[0].dtype, len(weights[0]), weights[0][0].numel()
    inputs = [of_inputs(metric, fan_in) for metric in metrics]
    if any(gram.ndim == 2 for gram in inputs):
        inputs = [torch.diag(gram) if gram.ndim == 1 else gram for gram in inputs]
    powers = [(gram if gram.ndim == 1 else gram.diagonal()).mean() for gram in inputs]
    counts = [metric.rows for metric in metrics]
    sizes = torch.stack(
        [(power if rows is None else rows).sqrt().expand(out) for power, rows in zip(powers, counts, strict=True)]
    )
    sizes = sizes.clamp_min(_LEAST * float(sizes.max()))[:, :, None]  # (N, out, 1)
    mean = torch.stack([gram / power for gram, power in zip(inputs, powers, strict=True)]).mean(dim=0)
    stack = torch.stack([matrix_of(weight) for weight in weights]).double() * sizes
    matrix, exponent = scaled_to_unit(stack.reshape(-1, fan_in))
    product = best_in_metric(matrix.to(dtype), rank, mean.to(dtype))
    inner, values, right = truncated_svd(product.left.T @ matrix.to(dtype), rank)
    root = values.sqrt()
    lefts = times_power_of_two((product.left @ inner * root).reshape(len(weights), out, -1) / sizes, exponent)
    right, lefts = _in_range([root[:, None] * right, lefts], dtype)
    return {"right": right}, [{"left": part} for part in lefts.unbind()]


def _in_range(factors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Spread the norms over all factors. Raises NumericalError where they exceed the type all the same."""
    scaled = [factor.to(dtype) for factor in even_ranges(factors)]
    if not all(bool(factor.isfinite().all()) for factor in scaled):
        raise NumericalError(f"joint: the norms of the weights exceed the range of {dtype}")
    return scaled
