"""svd: weight ~ left @ right, the truncated singular value decomposition of the (out, fan_in) matricisation.

Letters: out, fan_in as in base; r = rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError
from tcompress.formats.base import (
    _CONV,
    Factorization,
    Format,
    Shape,
    fan_in,
    matrix_of,
    require_matrix_like,
    take_factors,
)
from tcompress.linalg.svd import rank_for_error, singular_values, truncated_svd


@dataclass(frozen=True)
class SVD(Format):
    """Keep the ``rank`` largest singular triplets; a rank above the dimensions is clipped to them.

    seed: of the random start vectors for large matrices.
    """

    rank: int
    seed: int = 0

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "truncated SVD of the out x fan_in matrix"
    rebuild: ClassVar[str] = "(left @ right).reshape(shape)"
    reference: ClassVar[str] = "Eckart & Young 1936; for neural networks Denton et al. 2014"
    size_option: ClassVar[str] = "rank"
    quick: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise FormatError(f"svd: rank must be a whole number of at least 1, got {self.rank!r}")

    def fit(self, weight: Tensor) -> Factorization:
        left, values, right = truncated_svd(matrix_of(weight), self.rank, seed=self.seed)
        return _balanced(tuple(weight.shape), left, values, right)

    @classmethod
    def sweep(cls, weight: Tensor, settings: Sequence[Self]) -> Iterator[Factorization]:
        """Truncate one decomposition at the largest rank: its leading triplets are those of every smaller rank."""
        richest = max(settings, key=lambda setting: setting.rank)
        left, values, right = truncated_svd(matrix_of(weight), richest.rank, seed=richest.seed)
        for setting in settings:
            r = setting.rank
            yield _balanced(tuple(weight.shape), left[:, :r], values[:r], right[:r])

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        del nonzeros  # factors of a sparse weight are dense all the same
        r = min(self.rank, shape[0], fan_in(shape))
        return {"left": FactorSpec((shape[0], r), dtype), "right": FactorSpec((r, fan_in(shape)), dtype)}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        require_matrix_like(cls.name, shape)
        per_rank = (shape[0] + fan_in(shape)) * dtype.itemsize
        rank = min(budget_bytes // per_rank, shape[0], fan_in(shape))
        return cls(rank=rank, **options) if rank >= 1 else None

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        values = singular_values(matrix_of(weight))
        return cls(rank=max(1, rank_for_error(values, relative_error)), **options)

    def richer(self, shape: Shape) -> Self | None:
        if self.rank >= min(shape[0], fan_in(shape)):
            return None
        return type(self)(rank=self.rank + 1, seed=self.seed)

    @classmethod
    def load(cls, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        require_matrix_like(cls.name, shape)
        left, right = take_factors(cls.name, factors, "left", "right")
        if left.ndim != 2 or right.shape != (left.shape[1], fan_in(shape)) or left.shape[0] != shape[0]:
            raise FormatError(f"svd: factors {tuple(left.shape)} and {tuple(right.shape)} do not make {shape}")
        return LowRankMatrix(shape, left, right)


class LowRankMatrix(Factorization):
    """left: (out, r) and right: (r, fan_in)."""

    def __init__(self, shape: Shape, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)

    def reconstruct(self) -> Tensor:
        return (self.left @ self.right).reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        if self._saves_operations():
            return F.linear(F.linear(x, self.right), self.left)
        return super().linear(x)

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        if geometry.get("groups", 1) != 1 or not self._saves_operations():
            # In a grouped convolution each group has inputs of its own: the rows of `right` would mix them.
            return super().conv(x, **geometry)
        convolve = _CONV[len(self.shape)]
        r = self.right.shape[0]
        inner: Tensor = convolve(x, self.right.reshape(r, *self.shape[1:]), **geometry)
        ones = (1,) * (len(self.shape) - 2)
        outer: Tensor = convolve(inner, self.left.reshape(self.shape[0], r, *ones))
        return outer

    def embedding(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.left) @ self.right

    def _saves_operations(self) -> bool:
        """Multiplications per input through the factors, against those of the dense weight."""
        r, columns = self.right.shape
        return r * (self.shape[0] + columns) < self.shape[0] * columns


def _balanced(shape: Shape, left: Tensor, values: Tensor, right: Tensor) -> LowRankMatrix:
    """Give each factor the square root of the singular values: both then have one range, which half types need."""
    root = values.sqrt()
    return LowRankMatrix(shape, left * root, root[:, None] * right)
