"""svd: weight ~ left @ right, the truncated singular value decomposition of a matricisation.

Letters: out, in, fan_in as in base; kh = first size of the kernel, kw = product of its others; r = rank.
channel: the matrix is (out, fan_in). spatial: it is (out * kh, in * kw), a column of small convolutions after a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError
from tcompress.formats.base import (
    CONV,
    Factorization,
    Format,
    Shape,
    largest,
    require_count,
    require_matrix_like,
    take_factors,
)
from tcompress.formats.for_output import best_for_output, refined, unit_moment
from tcompress.formats.outlook import Outlook
from tcompress.formats.staged import StagedFactorization, Stages
from tcompress.linalg.output_error import best_in_metric
from tcompress.linalg.scaling import scaled_to_unit
from tcompress.linalg.svd import left_out, rank_at_price, rank_for_error, singular_values, truncated_svd

MATRICISATIONS = ("channel", "spatial")


@dataclass(frozen=True)
class SVD(Format):
    """Keep the ``rank`` largest singular triplets; a rank above the dimensions is clipped to them.

    seed: of the random start vectors for large matrices. matricisation: of convolutions; matrices have but one.
    """

    rank: int
    seed: int = 0
    matricisation: str = "channel"

    name: ClassVar[str] = "svd"
    summary: ClassVar[str] = "truncated SVD of the out x fan_in matrix, or of the spatial one"
    rebuild: ClassVar[str] = (
        "(left @ right).reshape(shape); spatial: .reshape(out, kh, in, kw).swapaxes(1, 2).reshape(shape)"
    )
    reference: ClassVar[str] = "Eckart & Young 1936; Denton et al. 2014; spatial: Jaderberg et al. 2014"
    size_option: ClassVar[str] = "rank"
    quick: ClassVar[bool] = True
    has_price: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_count("svd", "rank", self.rank)
        require_count("svd", "seed", self.seed, least=0)
        if self.matricisation not in MATRICISATIONS:
            raise FormatError(f"svd: matricisation is one of {', '.join(MATRICISATIONS)}, got {self.matricisation!r}")

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        matrix, shape = self.matrix(weight), tuple(weight.shape)
        left, values, right = truncated_svd(matrix, self.rank, seed=self.seed)
        plain = self._balanced(shape, left, values, right)
        if gram is None:
            return plain
        if self._is_spatial(shape):  # its columns are no inputs
            return refined(plain, weight, gram)
        moment = unit_moment(weight, gram)
        matrix = matrix.contiguous()
        product = best_in_metric(scaled_to_unit(matrix)[0], self.rank, moment, seed=self.seed)
        for_output = self.from_product(shape, product.left, product.left.T @ matrix)
        # The best one, but for rounding: where hardly anything is lost, that decides.
        return best_for_output([for_output, plain], weight, moment)

    def fit_at_price(self, weight: Tensor, price: float) -> Factorization:
        """Keep the singular values whose squares exceed the price of a rank (Idelbayev & Carreira-Perpinan 2020)."""
        matrix = self.matrix(weight)
        rank = rank_at_price(singular_values(matrix), price * sum(matrix.shape))
        return replace(self, rank=max(1, rank)).fit(weight)

    def sized_as(self, factors: Factorization) -> Self:
        return replace(self, rank=factors.state_dict()["left"].shape[1])

    @classmethod
    def sweep(cls, weight: Tensor, settings: Sequence[Self]) -> Iterator[Factorization]:
        """Truncate one decomposition at the largest rank: its leading triplets are those of every smaller rank."""
        if len({replace(setting, rank=1) for setting in settings}) > 1:
            yield from super().sweep(weight, settings)
            return
        richest = max(settings, key=lambda setting: setting.rank)
        left, values, right = truncated_svd(richest.matrix(weight), richest.rank, seed=richest.seed)
        for setting in settings:
            r = setting.rank
            yield setting._balanced(tuple(weight.shape), left[:, :r], values[:r], right[:r])

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        del nonzeros  # factors of a sparse weight are dense all the same
        rows, columns = self.sizes(shape)
        r = min(self.rank, rows, columns)
        return {"left": FactorSpec((rows, r), dtype), "right": FactorSpec((r, columns), dtype)}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        rows, columns = cls(**{**options, "rank": 1}).sizes(shape)

        def fits(rank: int) -> bool:
            return rank == 0 or cls(**{**options, "rank": rank}).stored_bytes(shape, dtype) <= budget_bytes

        rank = largest(fits, min(rows, columns))
        return cls(**{**options, "rank": rank}) if rank else None

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        values = singular_values(cls(**{**options, "rank": 1}).matrix(weight))
        return cls(**{**options, "rank": max(1, rank_for_error(values, relative_error))})

    @classmethod
    def outlook(cls, weight: Tensor) -> Outlook | None:
        lost = left_out(cls(rank=1).matrix(weight))
        return Outlook(lambda setting: float(lost[min(setting.rank, len(lost) - 1)]), is_exact=True)

    @property
    def by_rows(self) -> bool:
        return self.matricisation == "channel"

    def richer(self, shape: Shape) -> Self | None:
        return None if self.rank >= min(self.sizes(shape)) else replace(self, rank=self.rank + 1)

    def notes(self, shape: Shape) -> tuple[str, ...]:
        most = min(self.sizes(shape))
        return (f"rank {self.rank} is clipped to {most}",) if self.rank > most else ()

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        left, right = take_factors(self.name, factors, "left", "right")
        rows, columns = self.sizes(shape)
        if left.ndim != 2 or left.shape[0] != rows or right.shape != (left.shape[1], columns):
            raise FormatError(f"svd: factors {tuple(left.shape)} and {tuple(right.shape)} do not make {shape}")
        return self._factorization(shape, left, right)

    def _is_spatial(self, shape: Shape) -> bool:
        return self.matricisation == "spatial" and len(shape) > 2

    def sizes(self, shape: Shape) -> tuple[int, int]:
        """Return rows and columns of the matricisation."""
        require_matrix_like(self.name, shape)
        if self._is_spatial(shape):
            return shape[0] * shape[2], shape[1] * math.prod(shape[3:])
        return shape[0], math.prod(shape[1:])

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the matricisation that is decomposed."""
        matrix = weight.movedim(2, 1) if self._is_spatial(tuple(weight.shape)) else weight
        return matrix.reshape(self.sizes(tuple(weight.shape)))

    def _factorization(self, shape: Shape, left: Tensor, right: Tensor) -> Factorization:
        kind = SpatialPair if self._is_spatial(shape) else LowRankMatrix
        return kind(shape, left, right)

    def from_product(self, shape: Shape, left: Tensor, right: Tensor) -> Factorization:
        """Return the factorization left @ right of the matricisation; left: (rows, r), orthonormal columns."""
        inner, values, right = truncated_svd(right, left.shape[1], seed=self.seed)
        return self._balanced(shape, left @ inner, values, right)

    def _balanced(self, shape: Shape, left: Tensor, values: Tensor, right: Tensor) -> Factorization:
        """Give each factor the square root of the singular values: both have one range, which half types need."""
        root = values.sqrt()
        return self._factorization(shape, left * root, root[:, None] * right)


class LowRankMatrix(StagedFactorization):
    """left: (out, r) and right: (r, fan_in)."""

    def __init__(self, shape: Shape, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)

    def reconstruct(self) -> Tensor:
        return (self.left @ self.right).reshape(self.shape)

    def scale_rows(self, scales: Tensor) -> None:
        self.left.data = self.left.data * scales[:, None]

    def stage_ranks(self) -> tuple[int, int | None]:
        return self.left.shape[1], None

    def stages(self) -> Stages:
        return Stages(self.left, self.right.reshape(-1, *self.shape[1:]), None)


class SpatialPair(Factorization):
    """left: (out * kh, r) and right: (r, in * kw): a convolution along the other sizes, then one along the first."""

    def __init__(self, shape: Shape, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)

    def reconstruct(self) -> Tensor:
        out, in_, height, *width = self.shape
        return (self.left @ self.right).reshape(out, height, in_, *width).movedim(1, 2)

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        # The stride along the first size acts in the second convolution; taking all of it for the first is no less.
        return groups * self.right.numel() * steps + self.left.numel()

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        out, in_, height, *width = self.shape
        if isinstance(geometry.get("padding", 0), str) or not self.saves(**geometry):
            return super().conv(x, **geometry)
        groups, r = int(geometry.get("groups", 1)), self.left.shape[1]
        convolve, ones = CONV[len(self.shape)], (1,) * len(width)
        inner = x.reshape(x.shape[0] * groups, in_, *x.shape[2:])
        inner = convolve(inner, self.right.reshape(r, in_, 1, *width), **_part(geometry, len(width), first=False))
        inner = inner.reshape(x.shape[0], groups * r, *inner.shape[2:])
        column = self.left.reshape(out, height, r).movedim(1, 2).reshape(out, r, height, *ones)
        return convolve(inner, column, groups=groups, **_part(geometry, len(width), first=True))


def _along_first(value: Any, others: int) -> tuple[int, ...]:
    """Return a geometry option as one number for each spatial size, given how many follow the first."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * (others + 1) if len(numbers) == 1 else numbers


def _part(geometry: Mapping[str, Any], others: int, *, first: bool) -> dict[str, tuple[int, ...]]:
    """Return the geometry along the first spatial size alone, or along all but it."""
    neutral = {"stride": 1, "padding": 0, "dilation": 1}
    parts = {}
    for name, none in neutral.items():
        head, *tail = _along_first(geometry.get(name, none), others)
        parts[name] = (head, *[none] * others) if first else (none, *tail)
    return parts
