"""sparse: the weight's largest values where they stand, zeros elsewhere (magnitude pruning).

Letters: out, fan_in as in base; k = number of values kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from scipy import sparse as scipy_sparse
from torch import Tensor, nn

from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.errors import FormatError
from tcompress.formats.base import (
    Factorization,
    Format,
    Shape,
    fan_in,
    largest,
    matrix_of,
    require_matrix_like,
    take_factors,
)
from tcompress.linalg.magnitude import keep_largest, smallest_count_for_error


@dataclass(frozen=True)
class Sparse(Format):
    """Keep the fraction ``density`` of the values, those of largest magnitude (of equal ones the first)."""

    density: float

    name: ClassVar[str] = "sparse"
    summary: ClassVar[str] = "magnitude pruning; stored as bitmask or CSR, whichever is smaller"
    rebuild: ClassVar[str] = "matrix.reshape(shape)"
    reference: ClassVar[str] = "LeCun et al. 1990; Han et al. 2015; Hawkins et al. 2021, section 2.3"
    size_option: ClassVar[str] = "density"
    rank_option: ClassVar[str | None] = None
    quick: ClassVar[bool] = True
    has_threshold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.density, int | float) or not 0 <= self.density <= 1:
            raise FormatError(f"sparse: density must be a fraction from 0 to 1, got {self.density!r}")

    def kept(self, values: int) -> int:
        """Return how many of so many values are kept."""
        return min(values, math.floor(self.density * values + 0.5))

    def fit(self, weight: Tensor) -> Factorization:
        return SparseMatrix(tuple(weight.shape), keep_largest(matrix_of(weight), self.kept(weight.numel())))

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        values = math.prod(shape)
        kept = self.kept(values) if nonzeros is None else min(nonzeros, self.kept(values))
        return {"matrix": FactorSpec((shape[0], fan_in(shape)), dtype, kept)}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        require_matrix_like(cls.name, shape)
        matrix, values = (shape[0], fan_in(shape)), math.prod(shape)

        def fits(kept: int) -> bool:
            return cheapest_bytes(FactorSpec(matrix, dtype, kept)) <= budget_bytes

        kept = largest(fits, values)
        # Nothing kept is no layer but a row of zeros: a budget that allows only this allows nothing.
        return cls(density=kept / values, **options) if kept > 0 else None

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        return cls(density=smallest_count_for_error(weight, relative_error) / weight.numel(), **options)

    def richer(self, shape: Shape) -> Self | None:
        values = math.prod(shape)
        kept = self.kept(values)
        return None if kept >= values else type(self)(density=(kept + 1) / values)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        require_matrix_like(self.name, shape)
        (matrix,) = take_factors(self.name, factors, "matrix")
        if tuple(matrix.shape) != (shape[0], fan_in(shape)):
            raise FormatError(f"sparse: a matrix {tuple(matrix.shape)} does not make {shape}")
        return SparseMatrix(shape, matrix)


class SparseMatrix(Factorization):
    """matrix: (out, fan_in), zero where pruned."""

    def __init__(self, shape: Shape, matrix: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.matrix = nn.Parameter(matrix)

    def reconstruct(self) -> Tensor:
        return self.matrix.reshape(self.shape)

    def to_scipy(self) -> scipy_sparse.csr_array:
        """Return the (out, fan_in) matrix for SciPy, in float32 where SciPy lacks the type."""
        matrix = self.matrix.detach().cpu()
        if matrix.dtype in {torch.bfloat16, torch.float16}:
            matrix = matrix.float()
        return scipy_sparse.csr_array(matrix.numpy())
