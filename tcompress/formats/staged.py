"""Weights that factor into an in map, a small kernel and an out map: two or three cheap layers instead of one.

Letters: out, in, kernel as in base; p = columns of the out map; q = rows of the in map; g = groups.
weight[o, i, *k] = sum over p, q of out_map[o, p] middle[p, q, *k] in_map[q, i].
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tcompress.formats.base import CONV, Factorization, Shape
from tcompress.formats.effort import dense_effort


@dataclass(frozen=True)
class Stages:
    """out_map: (out, p); middle: (p, q, *kernel); in_map: (q, in), or None where the middle takes the input itself."""

    out_map: Tensor
    middle: Tensor
    in_map: Tensor | None

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what the maps make of x: (..., in)."""
        inner = x if self.in_map is None else F.linear(x, self.in_map)
        return F.linear(F.linear(inner, self.middle), self.out_map, bias)

    def conv(self, x: Tensor, bias: Tensor | None = None, **geometry: Any) -> Tensor:
        """Return the convolution of x: (batch, groups * in, *sizes) with every group's kernel in turn."""
        groups, dimensions = int(geometry.get("groups", 1)), self.middle.ndim - 2
        convolve, ones = CONV[self.middle.ndim], (1,) * dimensions
        batch, sizes = x.shape[0], x.shape[2:]
        # Each group has inputs of its own, and all groups share the in map and the kernel: they become batch entries.
        inner = x.reshape(batch * groups, x.shape[1] // groups, *sizes)
        if self.in_map is not None:
            inner = convolve(inner, self.in_map.reshape(*self.in_map.shape, *ones))
        inner = convolve(inner, self.middle, **{**geometry, "groups": 1})
        inner = inner.reshape(batch, groups * inner.shape[1], *inner.shape[2:])
        return convolve(inner, self.out_map.reshape(*self.out_map.shape, *ones), bias, groups=groups)

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows of these ids."""
        rest = self.middle if self.in_map is None else self.middle @ self.in_map
        return F.embedding(ids, self.out_map) @ rest

    def shortened(self) -> Stages:
        """Return the same matrix in two maps: the middle goes with the map of more ranks."""
        if self.in_map is None or self.middle.ndim > 2:
            return self
        p, q = self.middle.shape
        if p <= q:
            return Stages(self.out_map, self.middle @ self.in_map, None)
        return Stages(self.out_map @ self.middle, self.in_map, None)


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
        return self.stages().linear(x)

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        if not self.saves(**geometry):
            return super().conv(x, **geometry)
        return self.stages().conv(x, **geometry)

    def embedding(self, ids: Tensor) -> Tensor:
        p, _ = self.stage_ranks()
        rows, width = self.shape
        if ids.numel() * p >= rows * width:  # so many rows are asked for that the whole table costs no more
            return super().embedding(ids)
        return self.stages().embedding(ids)

    def prepared(self) -> Factorization:
        return PreparedStages(self.shape, self.stages())

    def rebuilding(self) -> int:
        return self.stage_ranks()[0] * math.prod(self.shape)

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        out, in_, kernel = self.shape[0], self.shape[1], math.prod(self.shape[2:])
        p, q = self.stage_ranks()
        through = groups * p * in_ * kernel if q is None else groups * (q * in_ * steps + p * q * kernel)
        return through + out * p


class PreparedStages(Factorization):
    """Stages that are at hand."""

    def __init__(self, shape: Shape, stages: Stages) -> None:
        super().__init__()
        self.shape = shape
        short = stages.shortened()
        in_map = None if short.in_map is None else short.in_map.contiguous()
        self.stages = Stages(short.out_map.contiguous(), short.middle.contiguous(), in_map)

    def reconstruct(self) -> Tensor:
        middle = self.stages.middle.flatten(2) if self.stages.middle.ndim > 2 else self.stages.middle[:, :, None]
        if self.stages.in_map is not None:
            middle = torch.einsum("pqk,qi->pik", middle, self.stages.in_map)
        return (self.stages.out_map @ middle.flatten(1)).reshape(self.shape)

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        out_map, middle, in_map = self.stages.out_map, self.stages.middle, self.stages.in_map
        first = 0 if in_map is None else groups * in_map.numel() * steps
        operations = first + groups * middle.numel() + self.shape[0] * out_map.shape[1]
        return dense_effort(operations, n, calls=2 if in_map is None else 3)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.stages.linear(x, bias)

    def conv(self, x: Tensor, bias: Tensor | None = None, **geometry: Any) -> Tensor:
        return self.stages.conv(x, bias, **geometry)

    def embedding(self, ids: Tensor) -> Tensor:
        return self.stages.embedding(ids)
