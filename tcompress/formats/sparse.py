"""sparse: the weight's largest values where they stand, zeros elsewhere (magnitude pruning); others for the output.

Letters: out, fan_in as in base; k = number of values kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    require_count,
    require_matrix_like,
    take_factors,
)
from tcompress.formats.compressed import can_run
from tcompress.formats.for_output import best_for_output, unit_moment
from tcompress.formats.outlook import Outlook
from tcompress.formats.pattern import Patterns
from tcompress.formats.placed import PlacedMatrix
from tcompress.formats.rows import CompressedRows
from tcompress.linalg.distance import compare
from tcompress.linalg.magnitude import keep_in_groups, keep_largest, smallest_count_for_error
from tcompress.linalg.output_error import refit_on_support, sparse_in_metric
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two
from tcompress.linalg.surgeon import surgeon

METHODS = ("magnitude", "surgeon")
_BLOCKS, _SMALLEST_BLOCK, _LARGEST_BLOCK = 8, 16, 128
_MOST_SORTED = 1 << 16  # values of a weight by which it is told what pruning leaves out
_GOLDEN = (math.sqrt(5) - 1) / 2
MOST_NEIGHBOURS = 16  # of a group: the largest for which there is an encoding


@dataclass(frozen=True)
class Sparse(Format):
    """Keep the fraction ``density`` of the values, those of largest magnitude (of equal ones the first).

    m: choose density * m of every m neighbours in a row: the n:m patterns that some hardware runs faster (2:4 is
    density=0.5, m=4).
    method: where the input's second moment is known. ``magnitude``: the entries of most weight in the output, then
    least squares. ``surgeon``: column after column, what follows making good what was lost. Without it they are one.
    """

    density: float
    m: int | None = None
    method: str = "magnitude"

    name: ClassVar[str] = "sparse"
    summary: ClassVar[str] = (
        "magnitude pruning, free or n:m; stored as bitmask, Elias-Fano or pattern, whichever is smallest"
    )
    rebuild: ClassVar[str] = "matrix.reshape(shape)"
    reference: ClassVar[str] = (
        "LeCun et al. 1990; Han et al. 2015; Hawkins et al. 2021, section 2.3; surgeon: Frantar & Alistarh 2023"
    )
    size_option: ClassVar[str] = "density"
    rank_option: ClassVar[str | None] = None
    quick: ClassVar[bool] = True
    has_threshold: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.density, int | float) or not 0 <= self.density <= 1:
            raise FormatError(f"sparse: density must be a fraction from 0 to 1, got {self.density!r}")
        if self.m is not None:
            require_count("sparse", "m", self.m)
            if self.m > MOST_NEIGHBOURS:
                raise FormatError(f"sparse: m is at most {MOST_NEIGHBOURS}, got {self.m}")
            if not (self.density * self.m).is_integer():
                raise FormatError(
                    f"sparse: density {self.density:g} of every {self.m} values is no whole number; "
                    f"take a multiple of 1/{self.m}"
                )
        if self.method not in METHODS:
            raise FormatError(f"sparse: method is one of {', '.join(METHODS)}, got {self.method!r}")

    def kept(self, values: int) -> int:
        """Return how many of so many values are kept."""
        return min(values, math.floor(self.density * values + 0.5))

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        shape, matrix = tuple(weight.shape), matrix_of(weight)
        if self.m is not None:
            self._require_groups(shape)
        plain = SparseMatrix(shape, self._largest(matrix))
        if gram is None:
            return plain
        moment = unit_moment(weight, gram)
        scaled, exponent = scaled_to_unit(matrix.contiguous())

        def from_scaled(values: Tensor) -> SparseMatrix:
            return SparseMatrix(shape, times_power_of_two(values, exponent) if exponent else values)

        if self.method == "surgeon":
            pattern = None if self.m is None else (self._of_group(), self.m)
            found = from_scaled(
                surgeon(scaled, moment, self.density, block=_block_of(matrix.shape[1]), pattern=pattern)
            )
            if best_for_output([found, plain], weight, moment) is found:
                return found
        found = from_scaled(sparse_in_metric(scaled, moment, self._largest))
        if best_for_output([found, plain], weight, moment) is found:
            return found
        return from_scaled(refit_on_support(scaled, self._largest(scaled), moment))

    def _largest(self, matrix: Tensor) -> Tensor:
        """Return a copy of a matrix of the weight's size with all but the largest values zero."""
        if self.m is None:
            return keep_largest(matrix, self.kept(matrix.numel()))
        return keep_in_groups(matrix, self._of_group(), self.m)

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        values, matrix = math.prod(shape), (shape[0], fan_in(shape))
        kept = self.kept(values) if nonzeros is None else min(nonzeros, self.kept(values))
        if self.m is None:
            return {"matrix": FactorSpec(matrix, dtype, kept)}
        self._require_groups(shape)
        return {"matrix": FactorSpec(matrix, dtype, kept, pattern=(self._of_group(), self.m))}

    def _of_group(self) -> int:
        return round(self.density * (self.m or 1))

    def _require_groups(self, shape: Shape) -> None:
        require_matrix_like(self.name, shape)
        if self.m is not None and fan_in(shape) % self.m:
            raise FormatError(f"sparse: rows of {fan_in(shape)} values are no groups of {self.m}")

    def unpruned(self, weight: Tensor) -> Tensor:
        if self.m is not None:
            raise FormatError("sparse: one threshold for many layers does not make groups of m; leave one of them out")
        return matrix_of(weight)

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        require_matrix_like(cls.name, shape)
        matrix, values = (shape[0], fan_in(shape)), math.prod(shape)
        m = options.get("m")
        if m is not None:
            by_group = [cls(density=n / m, m=m) for n in range(m, 0, -1)]
            return next((setting for setting in by_group if setting.stored_bytes(shape, dtype) <= budget_bytes), None)

        def fits(kept: int) -> bool:
            return cheapest_bytes(FactorSpec(matrix, dtype, kept)) <= budget_bytes

        kept = largest(fits, values)
        # Nothing kept is no layer but a row of zeros: a budget that allows only this allows nothing.
        return cls(density=kept / values, **options) if kept > 0 else None

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        m = options.get("m")
        if m is not None:
            by_group = (cls(density=n / m, m=m) for n in range(m))
            reaches = (
                s for s in by_group if compare(weight, s.fit(weight).reconstruct().detach())[1] <= relative_error
            )
            return next(reaches, cls(density=1.0, m=m))
        return cls(density=smallest_count_for_error(weight, relative_error) / weight.numel(), **options)

    @classmethod
    def outlook(cls, weight: Tensor) -> Outlook | None:
        magnitudes = _some_of(scaled_to_unit(weight.detach())[0].reshape(-1))
        squares = magnitudes.double().square().sort().values
        lost = torch.cat([squares.new_zeros(1), squares.cumsum(0)])
        whole = float(lost[-1]) or 1.0
        return Outlook(lambda setting: float(lost[len(squares) - setting.kept(len(squares))]) / whole, is_exact=True)

    def sized_as(self, factors: Factorization) -> Self:
        matrix = factors.state_dict()["matrix"]
        return replace(self, density=int(matrix.count_nonzero()) / matrix.numel())

    @property
    def added_matrix(self) -> str | None:
        return "matrix"

    @property
    def by_rows(self) -> bool:
        return True

    def richer(self, shape: Shape) -> Self | None:
        values = math.prod(shape)
        kept = self.kept(values)
        if kept >= values:
            return None
        return replace(self, density=(kept + 1) / values if self.m is None else (self._of_group() + 1) / self.m)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        require_matrix_like(self.name, shape)
        (matrix,) = take_factors(self.name, factors, "matrix")
        if tuple(matrix.shape) != (shape[0], fan_in(shape)):
            raise FormatError(f"sparse: a matrix {tuple(matrix.shape)} does not make {shape}")
        return SparseMatrix(shape, matrix)


def _some_of(values: Tensor) -> Tensor:
    """Return values of a large weight that stand for all: multiples of the golden ratio share no step with its rows."""
    if values.numel() <= _MOST_SORTED:
        return values
    spread = (torch.arange(_MOST_SORTED, dtype=torch.float64, device=values.device) * _GOLDEN).frac()
    return values[(spread * values.numel()).long()]


def _block_of(columns: int) -> int:
    """Return over how many columns the surgeon chooses at one time: knowing less than it later will, so not over all.

    Measured on correlated inputs: narrow layers lose less with several blocks than with one or two.
    """
    return min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, columns // _BLOCKS))


class SparseMatrix(Factorization):
    """matrix: (out, fan_in), zero where pruned."""

    def __init__(self, shape: Shape, matrix: Tensor) -> None:
        super().__init__()
        self.shape = shape
        self.matrix = nn.Parameter(matrix)

    def reconstruct(self) -> Tensor:
        return self.matrix.reshape(self.shape)

    def scale_rows(self, scales: Tensor) -> None:
        self.matrix.data = self.matrix.data * scales[:, None]

    def on_places(self, patterns: Patterns) -> tuple[Factorization, frozenset[str]]:
        if "matrix" not in patterns:
            return self, frozenset()
        return PlacedMatrix(self.shape, patterns["matrix"]), frozenset({"matrix"})

    def prepared(self) -> Factorization:
        return CompressedRows(self.matrix.detach()) if len(self.shape) == 2 and can_run(self.matrix) else self

    def to_scipy(self) -> scipy_sparse.csr_array:
        """Return the (out, fan_in) matrix for SciPy, in float32 where SciPy lacks the type."""
        matrix = self.matrix.detach().cpu()
        if matrix.dtype in {torch.bfloat16, torch.float16}:
            matrix = matrix.float()
        return scipy_sparse.csr_array(matrix.numpy())
