"""tucker: a small core and one factor of orthogonal columns for each channel mode, by ST-HOSVD and HOOI.

Letters: i1..id = out_modes; j1..je = in_modes; k = values of the kernel, which stays whole in the core.
With one mode a side (the usual of convolutions) this is Tucker-2; with more it is the folded Tucker (r-TK).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tcompress.errors import FormatError
from tcompress.formats.base import Factorization, Shape
from tcompress.formats.folded import Folded, Ranks
from tcompress.formats.folding import Folding
from tcompress.formats.for_output import refined
from tcompress.formats.staged import StagedFactorization, Stages
from tcompress.linalg.scaling import even_ranges
from tcompress.linalg.tucker import ranks_for_error, tucker, tucker_full, unfolding, usable_ranks


@dataclass(frozen=True)
class Tucker(Folded):
    """Tucker of rank at most ``rank`` in every channel mode, or of the given ``ranks``, one for each of them."""

    name: ClassVar[str] = "tucker"
    summary: ClassVar[str] = "Tucker core and factors (ST-HOSVD, HOOI); Tucker-2 for convolutions"
    rebuild: ClassVar[str] = "unfold(core x_n factors.n; *out_modes, *in_modes, k)"
    reference: ClassVar[str] = "De Lathauwer et al. 2000; Kim et al. 2016 (Tucker-2); Su et al. 2018 (r-TK)"
    quick: ClassVar[bool] = True

    @classmethod
    def usual_order(cls, shape: Shape) -> int:
        # Tucker of a plain matrix is its SVD with a core to pay for.
        return 1 if len(shape) > 2 else 2

    @classmethod
    def groups(cls, outs: int, ins: int, *, kernel: bool) -> tuple[tuple[int, ...], ...]:
        del kernel
        return tuple((position,) for position in range(outs + ins + 1))

    @classmethod
    def full_ranks(cls, folding: Folding) -> Ranks:
        return folding.sizes[:-1]

    @classmethod
    def reduced(cls, folding: Folding, ranks: Ranks) -> Ranks:
        return usable_ranks(folding.sizes[:-1], ranks, free=folding.kernel)

    @classmethod
    def factor_shapes(cls, folding: Folding, ranks: Ranks) -> Mapping[str, Shape]:
        factors = {f"factors.{k}": (folding.sizes[k], rank) for k, rank in enumerate(ranks)}
        return {"core": (*ranks, folding.kernel), **factors}

    @classmethod
    def unfoldings(cls, tensor: Tensor) -> list[Tensor]:
        return [unfolding(tensor, mode) for mode in range(tensor.ndim - 1)]

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        folding = self.folding(tuple(weight.shape))
        core, factors = tucker(folding.fold(weight), [*self.clipped(folding), None])
        core, *scaled = even_ranges([core, *(factor for factor in factors if factor is not None)])
        return refined(TuckerTensor(folding, core, scaled), weight, gram)

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        folding = cls(**{**options, "rank": 1}).folding(tuple(weight.shape))
        modes = range(len(folding.sizes) - 1)
        ranks = ranks_for_error(folding.fold(weight), relative_error, modes)
        return cls(**options, ranks=ranks).trimmed(weight, relative_error)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        if "core" not in factors:
            raise FormatError(f"tucker: has factors {sorted(factors)}, needs a core")
        core = factors["core"]
        folding = self.require_factors(shape, factors, tuple(core.shape[:-1]))
        return TuckerTensor(folding, core, [factors[f"factors.{k}"] for k in range(core.ndim - 1)])


class TuckerTensor(StagedFactorization):
    """core: (r1, ..., r_{d+e}, k); factors: (n_k, r_k) for each channel mode, those of out first."""

    def __init__(self, folding: Folding, core: Tensor, factors: list[Tensor]) -> None:
        super().__init__()
        self.shape, self.folding = folding.shape, folding
        self.core = nn.Parameter(core)
        self.factors = nn.ParameterList(factors)

    def reconstruct(self) -> Tensor:
        return self.folding.unfold(tucker_full(self.core, [*self.factors, None]))

    def stage_ranks(self) -> tuple[int, int | None]:
        outs = len(self.folding.out_modes)
        return math.prod(self.core.shape[:outs]), math.prod(self.core.shape[outs:-1])

    def stages(self) -> Stages:
        outs, factors = len(self.folding.out_modes), list(self.factors)
        p, q = self.stage_ranks()
        middle = self.core.reshape(p, q or 1, *self.shape[2:])
        out_map, in_map = reduce(torch.kron, factors[:outs]), reduce(torch.kron, factors[outs:])
        return Stages(out_map[: self.shape[0]], middle, in_map[: self.shape[1]].T)
