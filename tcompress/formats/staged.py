"""Weights that factor into an in map, a small kernel and an out map: two or three cheap layers instead of one.

Letters: out, in, kernel as in base; p = columns of the out map; q = rows of the in map; g = groups.
weight[o, i, *k] = sum over p, q of out_map[o, p] middle[p, q, *k] in_map[q, i].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tcompress.formats.base import CONV, Factorization


@dataclass(frozen=True)
class Stages:
    """out_map: (out, p); middle: (p, q, *kernel); in_map: (q, in), or None where the middle takes the input itself."""

    out_map: Tensor
    middle: Tensor
    in_map: Tensor | None


class StagedFactorization(Factorization):
    """A factorization that runs as stages where that takes fewer multiplications than the dense weight."""

    @abstractmethod
    def stages(self) -> Stages:
        """Return the maps, multiplied out where the factors are finer."""

    @abstractmethod
    def stage_ranks(self) -> tuple[int, int | None]:
        """Return p, and q or None, without any work."""

    def linear(self, x: Tensor) -> Tensor:
        if not self.saves():
            return super().linear(x)
        stages = self.stages()
        inner = x if stages.in_map is None else F.linear(x, stages.in_map)
        return F.linear(F.linear(inner, stages.middle), stages.out_map)

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        groups = int(geometry.get("groups", 1))
        if not self.saves(**geometry):
            return super().conv(x, **geometry)
        stages, convolve = self.stages(), CONV[len(self.shape)]
        ones = (1,) * (len(self.shape) - 2)
        batch, sizes = x.shape[0], x.shape[2:]
        # Each group has inputs of its own, and all groups share the in map and the kernel: they become batch entries.
        inner = x.reshape(batch * groups, self.shape[1], *sizes)
        if stages.in_map is not None:
            inner = convolve(inner, stages.in_map.reshape(*stages.in_map.shape, *ones))
        inner = convolve(inner, stages.middle, **{**geometry, "groups": 1})
        inner = inner.reshape(batch, groups * inner.shape[1], *inner.shape[2:])
        return convolve(inner, stages.out_map.reshape(*stages.out_map.shape, *ones), groups=groups)

    def embedding(self, ids: Tensor) -> Tensor:
        p, _ = self.stage_ranks()
        rows, width = self.shape
        if ids.numel() * p >= rows * width:  # so many rows are asked for that the whole table costs no more
            return super().embedding(ids)
        stages = self.stages()
        rest = stages.middle if stages.in_map is None else stages.middle @ stages.in_map
        return F.embedding(ids, stages.out_map) @ rest

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        out, in_, kernel = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        p, q = self.stage_ranks()
        through = groups * p * in_ * kernel if q is None else groups * (q * in_ * steps + p * q * kernel)
        return through + out * p
