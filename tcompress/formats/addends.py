"""A weight as a sum of factorizations, each of which runs in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tcompress.formats.base import Factorization, Shape


class Addends(Factorization):
    """Prepared factorizations of one shape, whose weights are added."""

    def __init__(self, shape: Shape, members: Sequence[Factorization]) -> None:
        super().__init__()
        self.shape = shape
        self.members = tuple(members)

    def reconstruct(self) -> Tensor:
        first, *others = (member.reconstruct() for member in self.members)
        return sum(others, first)

    def can_compile(self) -> bool:
        return all(member.can_compile() for member in self.members)

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        return sum(member.effort(n, groups=groups, steps=steps) for member in self.members)

    def linear(self, x: Tensor) -> Tensor:
        first, *others = (member.linear(x) for member in self.members)
        return sum(others, first)

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        first, *others = (member.conv(x, **geometry) for member in self.members)
        return sum(others, first)

    def embedding(self, ids: Tensor) -> Tensor:
        first, *others = (member.embedding(ids) for member in self.members)
        return sum(others, first)
