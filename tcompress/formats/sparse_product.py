"""sparse-product: weight ~ scale * S_1 S_2 ... S_Q, a product of sparse matrices (hierarchical PALM4MSA).

Letters: out, fan_in as in base; Q = count, the number of factors; s = nonzeros kept in every row and every column.
The matrix is the (out, fan_in) matricisation; the smaller of the two sizes is that of the inner factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError
from tcompress.formats.base import (
    Factorization,
    Format,
    Shape,
    fan_in,
    largest,
    matrix_of,
    require_count,
    require_matrix_like,
)
from tcompress.formats.compressed import can_run, compressed_rows
from tcompress.formats.effort import dense_effort
from tcompress.formats.for_output import refined
from tcompress.formats.pattern import Pattern, Patterns, rows_in
from tcompress.formats.rows import CompressedRows
from tcompress.formats.search import smallest_reaching
from tcompress.linalg.palm import product, sparse_product
from tcompress.linalg.sparse_sets import default_count, full_nonzeros, sparse_product_nonzeros

_MOST_FACTORS = 64


@dataclass(frozen=True)
class SparseProduct(Format):
    """Keep in every factor the ``nonzeros`` largest values of each row and of each column.

    count: number of factors, 2 or more; None takes the paper's, the logarithm of the larger size.
    """

    nonzeros: int
    count: int | None = 2

    name: ClassVar[str] = "sparse-product"
    summary: ClassVar[str] = "product of sparse matrices (hierarchical PALM4MSA)"
    rebuild: ClassVar[str] = "(scale * factors.0 @ factors.1 @ ...).reshape(shape)"
    reference: ClassVar[str] = "Le Magoarou & Gribonval 2016; Giffon et al. 2021 (PSM-nets)"
    size_option: ClassVar[str] = "nonzeros"
    rank_option: ClassVar[str | None] = "nonzeros"
    quick: ClassVar[bool] = False
    exact_bytes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_count(self.name, "nonzeros", self.nonzeros)
        if self.count is not None:
            require_count(self.name, "count", self.count, least=2)
            if self.count > _MOST_FACTORS:
                raise FormatError(f"{self.name}: count is at most {_MOST_FACTORS}, got {self.count}")

    def factors(self, shape: Shape) -> int:
        """Return the number of factors."""
        require_matrix_like(self.name, shape)
        return self.count or max(2, default_count(shape[0], fan_in(shape)))

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        shape = tuple(weight.shape)
        scale, factors = sparse_product(matrix_of(weight), self.nonzeros, self.factors(shape))
        scale_of = torch.tensor([scale], dtype=torch.float64)
        found = SparseFactors(shape, scale_of.to(weight), [factor.to(weight) for factor in factors])
        return refined(found, weight, gram, keeps_zeros=True)

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        del nonzeros  # factors of a sparse weight are no sparser
        count = self.factors(shape)
        bounds = sparse_product_nonzeros(shape[0], fan_in(shape), self.nonzeros, count)
        sparse = {f"factors.{k}": FactorSpec(size, dtype, most) for k, (size, most) in enumerate(bounds)}
        return {"scale": FactorSpec((1,), dtype), **sparse}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        def fits(nonzeros: int) -> bool:
            setting = cls(**{**options, "nonzeros": max(1, nonzeros)})
            return nonzeros == 0 or setting.stored_bytes(shape, dtype) <= budget_bytes

        require_matrix_like(cls.name, shape)
        nonzeros = largest(fits, full_nonzeros(shape[0], fan_in(shape)))
        return cls(**{**options, "nonzeros": nonzeros}) if nonzeros else None

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        most = full_nonzeros(weight.shape[0], fan_in(tuple(weight.shape)))
        return smallest_reaching(weight, relative_error, lambda s: cls(**{**options, "nonzeros": s}), most)

    def richer(self, shape: Shape) -> Self | None:
        require_matrix_like(self.name, shape)
        if self.nonzeros >= full_nonzeros(shape[0], fan_in(shape)):
            return None
        return replace(self, nonzeros=self.nonzeros + 1)

    def pinned(self, shape: Shape) -> Self:
        return replace(self, count=self.factors(shape))

    def notes(self, shape: Shape) -> tuple[str, ...]:
        most = full_nonzeros(shape[0], fan_in(shape))
        return (f"nonzeros {self.nonzeros} are clipped to {most}",) if self.nonzeros > most else ()

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        names = [f"factors.{k}" for k in range(len(factors) - 1)]
        if set(factors) != {"scale", *names} or len(names) != self.factors(shape):
            raise FormatError(f"{self.name}: has factors {sorted(factors)}, needs scale and {self.factors(shape)} more")
        matrices = [factors[name] for name in names]
        ends = [shape[0], *(matrix.shape[0] if matrix.ndim == 2 else -1 for matrix in matrices[1:]), fan_in(shape)]
        expected = list(pairwise(ends))
        if [tuple(matrix.shape) for matrix in matrices] != expected or factors["scale"].shape != (1,):
            raise FormatError(
                f"{self.name}: factors {[tuple(matrix.shape) for matrix in matrices]} do not make {shape}"
            )
        return SparseFactors(shape, factors["scale"], matrices)


class SparseFactors(Factorization):
    """scale: (1,); factors: S_1 (out, a), S_2 (a, b), ..., S_Q (z, fan_in), mostly zeros."""

    def __init__(self, shape: Shape, scale: Tensor, factors: list[Tensor]) -> None:
        super().__init__()
        self.shape = shape
        self.scale = nn.Parameter(scale)
        self.factors = nn.ParameterList(factors)

    def reconstruct(self) -> Tensor:
        return (self.scale * product(list(self.factors))).reshape(self.shape)

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        del steps
        # A convolution has no sparse kernel here, and a compiler knows no compressed rows: they take the dense weight.
        if groups != 1 or len(self.shape) > 2 or not can_run(self.scale):
            return super().operations()
        return sum(int(torch.count_nonzero(factor)) for factor in self.factors)

    def on_places(self, patterns: Patterns) -> tuple[Factorization, frozenset[str]]:
        names = [f"factors.{number}" for number in range(len(self.factors))]
        if not set(names) <= set(patterns):
            return self, frozenset()
        return PlacedFactors(self.shape, [patterns[name] for name in names]), frozenset(names)

    def prepared(self) -> Factorization:
        if len(self.shape) > 2 or not can_run(self.scale):
            return self
        first, *others = (factor.detach() for factor in self.factors)
        return Chain(self.shape, [CompressedRows(factor) for factor in (self.scale.detach() * first, *others)])

    def linear(self, x: Tensor) -> Tensor:
        # Sparse products have no gradient for the values of a factor, nor the types that autocast asks for.
        is_plain = not torch.is_grad_enabled() and can_run(self.scale)
        if not is_plain or torch.is_autocast_enabled(x.device.type) or not self.saves():
            return super().linear(x)
        state = x.reshape(-1, self.shape[1]).T
        for factor in reversed(list(self.factors)):
            state = compressed_rows(factor) @ state
        return (self.scale * state.T).reshape(*x.shape[:-1], self.shape[0])

    def embedding(self, ids: Tensor) -> Tensor:
        return _looked_up(ids, self.scale, list(self.factors))


def _looked_up(ids: Tensor, scale: Tensor, factors: list[Tensor]) -> Tensor:
    """Return the rows of these ids, (*ids.shape, width), of a product of dense factors."""
    first, *others = factors
    return F.embedding(ids, first) @ (scale * product(others))


class PlacedFactors(Factorization):
    """scale: (1,); factors: of each, the values at the places of its pattern."""

    def __init__(self, shape: Shape, patterns: Sequence[Callable[[], Pattern]]) -> None:
        super().__init__()
        self.shape = shape
        empty = torch.empty(0, device="meta")  # all are given for each call
        self.scale = nn.Parameter(empty, requires_grad=False)
        self.factors = nn.ParameterList([nn.Parameter(empty, requires_grad=False) for _ in patterns])
        self._patterns = patterns

    def reconstruct(self) -> Tensor:
        return (self.scale * product(self._dense())).reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        placed = self._placed()
        if not all(pattern.suits(x, values) for pattern, values in placed):
            return super().linear(x)
        n, sizes = rows_in(x), [pattern.shape[0] for pattern, _ in placed]
        multiplied = self.shape[1] * sum(map(math.prod, pairwise(sizes)))
        if sum(pattern.effort(n) for pattern, _ in placed) > dense_effort(math.prod(self.shape), n) + multiplied:
            return super().linear(x)
        for pattern, values in reversed(placed):
            x = pattern.linear(x, values)
        return self.scale * x

    def embedding(self, ids: Tensor) -> Tensor:
        return _looked_up(ids, self.scale, self._dense())

    def _dense(self) -> list[Tensor]:
        return [pattern.dense(values) for pattern, values in self._placed()]

    def _placed(self) -> list[tuple[Pattern, Tensor]]:
        return [(pattern(), values) for pattern, values in zip(self._patterns, self.factors, strict=True)]


class Chain(Factorization):
    """A product of compressed rows, in the order of the factors."""

    def __init__(self, shape: Shape, members: Sequence[CompressedRows]) -> None:
        super().__init__()
        self.shape = shape
        self.members = tuple(members)

    def reconstruct(self) -> Tensor:
        return product([member.reconstruct() for member in self.members])

    def can_compile(self) -> bool:
        return all(member.can_compile() for member in self.members)

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        return sum(member.effort(n, groups=groups, steps=steps) for member in self.members)

    def linear(self, x: Tensor) -> Tensor:
        for member in reversed(self.members):
            x = member.linear(x)
        return x
