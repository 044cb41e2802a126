"""A weight as a sum of factorizations, each of which runs in its own way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

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


class SumOfTerms(Factorization):
    """terms: factorizations whose weights are added; None for a term of rank 0."""

    def __init__(self, shape: Shape, terms: Sequence[Factorization | None]) -> None:
        super().__init__()
        self.shape = shape
        self.terms = nn.ModuleDict({str(position): term for position, term in enumerate(terms) if term is not None})

    def reconstruct(self) -> Tensor:
        members = iter(self.members())
        whole = next(members).reconstruct()
        for term in members:  # one at a time: all together would take the memory of so many weights
            whole = whole + term.reconstruct()
        return whole

    def members(self) -> list[Factorization]:
        """Return the terms that are there."""
        return [term for term in self.terms.values() if isinstance(term, Factorization)]

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        return sum(term.operations(groups=groups, steps=steps) for term in self.members())

    def prepared(self) -> Factorization:
        return Addends(self.shape, [term.prepared() for term in self.members()])

    def linear(self, x: Tensor) -> Tensor:
        if not self.saves():
            return super().linear(x)
        first, *others = (term.linear(x) for term in self.members())
        return sum(others, first)

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        if isinstance(geometry.get("padding", 0), str) or not self.saves(**geometry):
            return super().conv(x, **geometry)
        first, *others = (term.conv(x, **geometry) for term in self.members())
        return sum(others, first)
