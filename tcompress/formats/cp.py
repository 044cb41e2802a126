"""cp: a sum of rank-one tensors, by alternating least squares with the norms of the components kept bounded.

Letters: i1..id = out_modes; j1..jd = in_modes; k = values of the kernel; R = rank.
With one mode a side the tensor is (out, in, k): a convolution then runs as pointwise, depthwise, pointwise. With more
the modes are paired, (i1 j1), ..., (id jd), k: the folded CP (r-CP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.errors import FormatError
from tcompress.formats.base import CONV, Factorization, Shape, require_count
from tcompress.formats.folded import Folded, Ranks
from tcompress.formats.folding import Folding
from tcompress.formats.for_output import refined
from tcompress.formats.search import smallest_within
from tcompress.formats.ttm import digits
from tcompress.linalg.cp import cp_als, cp_reconstruct
from tcompress.linalg.distance import compare
from tcompress.linalg.scaling import even_ranges


@dataclass(frozen=True)
class CP(Folded):
    """CP of ``rank`` components (``ranks`` would be a list of that one number).

    seed: of the random starts. starts: how many are tried for a few sweeps before the best is continued.
    """

    seed: int = 0
    starts: int = 3

    name: ClassVar[str] = "cp"
    summary: ClassVar[str] = "sum of rank-one tensors (ALS, norms bounded); folded CP (r-CP) for matrices"
    rebuild: ClassVar[str] = "unfold(sum_r weights[r] outer(factors.n[:, r]); out, in, k or i1, j1, i2, j2, ..., k)"
    reference: ClassVar[str] = "Harshman 1970; Lebedev et al. 2015; Phan et al. 2020; Su et al. 2018 (r-CP)"
    quick: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self.name, "seed", self.seed, least=0)
        require_count(self.name, "starts", self.starts)

    @classmethod
    def usual_order(cls, shape: Shape) -> int:
        # Two pairs would make a matrix, whose CP is its SVD.
        return 1 if len(shape) > 2 else 3

    @classmethod
    def groups(cls, outs: int, ins: int, *, kernel: bool) -> tuple[tuple[int, ...], ...]:
        if outs == ins == 1:
            return ((0,), (1,), (2,))[: 3 if kernel else 2]
        if outs != ins:
            raise FormatError(f"cp: pairs out_modes with in_modes, but there are {outs} and {ins}")
        pairs = [(pair, outs + pair) for pair in range(outs)]
        return (*pairs, (2 * outs,)) if kernel else tuple(pairs)

    @classmethod
    def full_ranks(cls, folding: Folding) -> Ranks:
        return (math.prod(folding.sizes) // max(folding.sizes),)

    @classmethod
    def factor_shapes(cls, folding: Folding, ranks: Ranks) -> Mapping[str, Shape]:
        (rank,) = ranks
        return {"weights": (rank,), **{f"factors.{k}": (size, rank) for k, size in enumerate(folding.sizes)}}

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        folding = self.folding(tuple(weight.shape))
        (rank,) = self.clipped(folding)
        weights, factors = cp_als(folding.fold(weight), rank, seed=self.seed, starts=self.starts)
        weights, *factors = even_ranges([weights, *factors])
        return refined(CPTensor(folding, weights, factors), weight, gram)

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        """Search the ranks that are smaller than dense; the full rank, which is exact, where none of them does."""
        shape = tuple(weight.shape)
        (full,) = cls.full_ranks(cls(**{**options, "rank": 1}).folding(shape))
        useful = cls.within(shape, weight.dtype, weight.numel() * weight.dtype.itemsize, **options)
        most = 0 if useful is None or useful.rank is None else useful.rank

        def reaches(rank: int) -> bool:
            found = cls(**{**options, "rank": rank}).fit(weight)
            return compare(weight, found.reconstruct().detach())[1] <= relative_error

        rank = smallest_within(reaches, most + 1)
        return cls(**{**options, "rank": rank if rank <= most else full})

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        ranks = (factors["weights"].numel(),) if "weights" in factors else (0,)
        folding = self.require_factors(shape, factors, ranks)
        return CPTensor(folding, factors["weights"], [factors[f"factors.{k}"] for k in range(len(factors) - 1)])


class CPTensor(Factorization):
    """weights: (R,); factors: (n_k, R) each, their columns of one norm."""

    slowness: ClassVar[float] = 3.0  # it multiplies elementwise, which is bound by memory

    def __init__(self, folding: Folding, weights: Tensor, factors: list[Tensor]) -> None:
        super().__init__()
        self.shape, self.folding = folding.shape, folding
        self.weights = nn.Parameter(weights)
        self.factors = nn.ParameterList(factors)

    def reconstruct(self) -> Tensor:
        return self.folding.unfold(cp_reconstruct(self.weights, list(self.factors)))

    @property
    def _is_paired(self) -> bool:
        return len(self.folding.out_modes) > 1

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        rank, outs, ins = len(self.weights), self.folding.out_modes, self.folding.in_modes
        if self._is_paired:
            if len(self.shape) > 2:  # outputs and kernel are not apart: it takes the dense weight
                return super().operations()
            return rank * sum(math.prod(outs[: k + 1]) * math.prod(ins[k:]) for k in range(len(outs)))
        return groups * rank * (self.shape[1] * steps + self.folding.kernel) + self.shape[0] * rank

    def linear(self, x: Tensor) -> Tensor:
        if not self.saves():
            return super().linear(x)
        if not self._is_paired:
            out_map, in_map = self.factors
            return F.linear(F.linear(x, in_map.T) * self.weights, out_map)
        flat = x.reshape(-1, self.shape[1])
        if self.folding.is_padded:
            flat = F.pad(flat, (0, self.folding.padded[1] - self.shape[1]))
        count = flat.shape[0]  # not len(flat), which an export would write down
        state = flat.reshape(count, 1, flat.shape[1], 1)  # (inputs, outputs so far, inputs left, R or 1)
        for factor, i, j in zip(self.factors, self.folding.out_modes, self.folding.in_modes, strict=True):
            split = state.reshape(count, state.shape[1], j, state.shape[2] // j, state.shape[3])
            state = torch.einsum("npjqr,ijr->npiqr", split.expand(-1, -1, -1, -1, factor.shape[1]), _pair(factor, i, j))
            state = state.flatten(1, 2)
        return (state[:, : self.shape[0], 0] @ self.weights).reshape(*x.shape[:-1], self.shape[0])

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        if not self.saves(**geometry):
            return super().conv(x, **geometry)
        out_map, in_map, kernel = self.factors
        convolve, ones = CONV[len(self.shape)], (1,) * (len(self.shape) - 2)
        batch, groups, rank = x.shape[0], int(geometry.get("groups", 1)), len(self.weights)
        inner = x.reshape(batch * groups, self.shape[1], *x.shape[2:])
        inner = convolve(inner, in_map.T.reshape(rank, -1, *ones))
        depthwise = (kernel * self.weights).T.reshape(rank, 1, *self.shape[2:])
        inner = convolve(inner, depthwise, **{**geometry, "groups": rank})
        inner = inner.reshape(batch, groups * rank, *inner.shape[2:])
        return convolve(inner, out_map.reshape(*out_map.shape, *ones), groups=groups)

    def embedding(self, ids: Tensor) -> Tensor:
        width = self.shape[1]
        if ids.numel() * 2 >= self.folding.padded[0]:  # so many rows that the whole table costs no more
            return super().embedding(ids)
        flat = ids.reshape(-1)
        rows = self.weights.expand(len(flat), 1, -1)  # (ids, columns so far, R)
        folded = zip(self.factors, self.folding.out_modes, self.folding.in_modes, strict=True)
        if not self._is_paired:
            out_map, in_map = self.factors
            return torch.matmul(F.embedding(ids, out_map) * self.weights, in_map.T)
        for (factor, i, j), digit in zip(folded, digits(flat, self.folding.out_modes, self.shape[0]), strict=True):
            rows = torch.einsum("ncr,njr->ncjr", rows, _pair(factor, i, j)[digit]).flatten(1, 2)
        return rows[:, :width].sum(2).reshape(*ids.shape, width)


def _pair(factor: Tensor, i: int, j: int) -> Tensor:
    """Return a paired factor as (i, j, R)."""
    return factor.reshape(i, j, -1)
