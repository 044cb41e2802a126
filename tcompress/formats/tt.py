"""tt: the weight, folded into many modes, as a tensor train by TT-SVD.

Letters: i1..id = out_modes; j1..je = in_modes; k = values of the kernel; the train runs i1..id, k, j1..je (no k for a
matrix). Cores left of the kernel make the map to the outputs, those right of it the map from the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tcompress.formats.base import Factorization, Shape
from tcompress.formats.folded import Folded, Ranks
from tcompress.formats.folding import Folding
from tcompress.formats.for_output import refined
from tcompress.formats.staged import StagedFactorization, Stages
from tcompress.linalg.scaling import even_ranges
from tcompress.linalg.tensor_train import full_ranks, ranks_for_error, tt_chain, tt_full, tt_svd, usable_ranks


@dataclass(frozen=True)
class TT(Folded):
    """Tensor train of rank at most ``rank`` at every cut, or of the given ``ranks``, one for each cut."""

    name: ClassVar[str] = "tt"
    summary: ClassVar[str] = "tensor train of the folded weight (TT-SVD)"
    rebuild: ClassVar[str] = "unfold(train(cores); *out_modes, k, *in_modes)"
    reference: ClassVar[str] = "Oseledets 2011; Novikov et al. 2015; Garipov et al. 2016"
    quick: ClassVar[bool] = True

    @classmethod
    def usual_order(cls, shape: Shape) -> int:
        del shape
        return 2

    @classmethod
    def groups(cls, outs: int, ins: int, *, kernel: bool) -> tuple[tuple[int, ...], ...]:
        positions = [*range(outs), *([outs + ins] if kernel else []), *range(outs, outs + ins)]
        return tuple((position,) for position in positions)

    @classmethod
    def full_ranks(cls, folding: Folding) -> Ranks:
        return full_ranks(folding.sizes)

    @classmethod
    def reduced(cls, folding: Folding, ranks: Ranks) -> Ranks:
        return usable_ranks(folding.sizes, ranks)

    @classmethod
    def factor_shapes(cls, folding: Folding, ranks: Ranks) -> Mapping[str, Shape]:
        return train_shapes(folding.sizes, ranks)

    @classmethod
    def unfoldings(cls, tensor: Tensor) -> list[Tensor]:
        return [tensor.reshape(math.prod(tensor.shape[:k]), -1) for k in range(1, tensor.ndim)]

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        folding = self.folding(tuple(weight.shape))
        cores = even_ranges(tt_svd(folding.fold(weight), self.clipped(folding)))
        return refined(TensorTrain(folding, cores), weight, gram)

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        folding = cls(**{**options, "rank": 1}).folding(tuple(weight.shape))
        ranks = ranks_for_error(folding.fold(weight), relative_error)
        if not ranks:  # a single mode is the weight itself
            return cls(**options, rank=1)
        found = cls(**options, ranks=ranks)
        return found.trimmed(weight, relative_error) if folding.is_padded else found

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        cores = cores_of(factors)
        folding = self.require_factors(shape, factors, tuple(core.shape[-1] for core in cores[:-1]))
        return TensorTrain(folding, cores)


class TensorTrain(StagedFactorization):
    """cores: (r_{k-1}, n_k, r_k) each, in the order of the train."""

    def __init__(self, folding: Folding, cores: list[Tensor]) -> None:
        super().__init__()
        self.shape, self.folding = folding.shape, folding
        self.cores = nn.ParameterList(cores)

    def reconstruct(self) -> Tensor:
        return self.folding.unfold(tt_full(list(self.cores)))

    def stage_ranks(self) -> tuple[int, int | None]:
        outs = len(self.folding.out_modes)
        p = self.cores[outs - 1].shape[2]
        return p, self.cores[outs].shape[2] if len(self.shape) > 2 else None

    def stages(self) -> Stages:
        outs, cores = len(self.folding.out_modes), list(self.cores)
        out_map = tt_chain(cores[:outs])[0]
        if len(self.shape) == 2:
            return Stages(out_map[: self.shape[0]], tt_chain(cores[outs:])[:, : self.shape[1], 0], None)
        p, _, q = cores[outs].shape
        middle = cores[outs].movedim(1, 2).reshape(p, q, *self.shape[2:])
        in_map = tt_chain(cores[outs + 1 :])[:, : self.shape[1], 0]
        return Stages(out_map[: self.shape[0]], middle, in_map)


def train_shapes(sizes: Shape, ranks: Ranks) -> dict[str, Shape]:
    """Return the shapes of a train's cores, by the names under which they are stored."""
    around = (1, *ranks, 1)
    return {f"cores.{k}": (around[k], size, around[k + 1]) for k, size in enumerate(sizes)}


def cores_of(factors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the cores that are there, in order; whether they fit is for require_factors to say."""
    found = [factors[f"cores.{k}"] for k in range(len(factors)) if f"cores.{k}" in factors]
    return [core if core.ndim else core.reshape(1) for core in found] or [torch.zeros(1)]
