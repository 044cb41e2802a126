"""Formats of several layers at once: factors that all members share, and factors of each member's own.

Letters: N = members of a group, weights of one shape. One weight alone is a group of one, so that every law of a Format
holds; it shares nothing and is seldom worth it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.formats.base import Factorization, Format, Shape
from tcompress.formats.metric import Metric
from tcompress.formats.together import Fit

Specs = Mapping[str, FactorSpec]


@dataclass(frozen=True)
class GroupFormat(Format):
    """A decision about a group of layers."""

    alternatives: ClassVar[tuple[type[Format], ...]]  # what the members could have instead, each for itself

    @abstractmethod
    def fit_together(self, weights: Sequence[Tensor], metrics: Sequence[Metric] = ()) -> Fit:
        """Return the shared factors and each member's own; ``load`` takes both together. Raises as ``fit``.

        metrics: of the members, which errors count and how much; none where all count alike. With them the sum of the
        squared errors becomes small, and is never larger than that of the fit without.
        """

    @abstractmethod
    def group_specs(self, shape: Shape, dtype: torch.dtype, members: int) -> tuple[Specs, Specs]:
        """Return shape of the shared factors, and of one member's own, before the fit."""

    @classmethod
    @abstractmethod
    def within_together(
        cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, members: int, **options: Any
    ) -> Self | None:
        """Return the richest setting whose factors, those of all members, fit the budget; None when none does."""

    @classmethod
    @abstractmethod
    def reaching_together(cls, weights: Sequence[Tensor], relative_error: float, **options: Any) -> Self:
        """Return the smallest setting found with which every member stays within the error."""

    def group_bytes(self, shape: Shape, dtype: torch.dtype, members: int) -> int:
        """Bytes of all factors of the group."""
        shared, own = self.group_specs(shape, dtype, members)
        return sum(map(cheapest_bytes, shared.values())) + members * sum(map(cheapest_bytes, own.values()))

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        shared, (own,) = self.fit_together([weight], () if gram is None else [Metric(gram)])
        return self.load(tuple(weight.shape), {**shared, **own})

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Specs:
        del nonzeros
        shared, own = self.group_specs(shape, dtype, 1)
        return {**shared, **own}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        return cls.within_together(shape, dtype, budget_bytes, 1, **options)

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        return cls.reaching_together([weight], relative_error, **options)
