"""low-rank-sparse: weight ~ L + S, the coarse structure in a low-rank format and what stands out of it kept sparse.

Letters: A = the weight as its matrix (out, fan_in); L, S = the low-rank and the sparse part; k = nonzeros of S.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

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
)
from tcompress.formats.for_output import best_for_output, unit_moment
from tcompress.formats.inner import parse_inner, sizes_of, text_of
from tcompress.formats.low_rank_part import FEW_ROUNDS, alternate, alternate_for_output, fit_around, solver_for
from tcompress.formats.low_rank_plus_sparse import LowRankPlusSparse
from tcompress.formats.options import make
from tcompress.formats.sparse import Sparse, SparseMatrix
from tcompress.formats.svd import SVD
from tcompress.linalg.distance import compare, frobenius_norm
from tcompress.linalg.magnitude import keep_largest, smallest_count_for_error
from tcompress.linalg.output_error import sparse_in_metric
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two

METHODS = ("alternating", "residual", "masking")
RECONSTRUCTIONS = ("additive", "masking")
AUTO = "auto"
_USUAL_SHARE = 0.1  # the paper's
_OF_BUDGET = 4  # the low-rank part takes one part in so many of a budget at most, as in OATS, if no share is given
_TRIED_SHARES = (0.0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)  # of a budget's bytes, when the share is searched
_REFINEMENTS = 2  # each half-way between the best share and its neighbours
_FINALISTS = 3  # shares that are fitted with all rounds: few rounds favour a small low-rank part
_FINENESS = 64  # the density is searched to one part in so many of itself


@dataclass(frozen=True)
class LowRankSparse(Format):
    """The format ``low_rank`` (a name, with options as ``tt:order=3``) plus a fraction ``density`` of single values.

    rank, ranks: of the low-rank part; a rank of 0 leaves it out. share: without a rank, its elements over those of the
    weight (0.1, or less where that is above a quarter of a budget); ``auto`` looks for the share that serves a budget
    best.
    method: how L is found. ``residual``: the plain fit of A (paper, equation 12). ``masking``: the fit of those entries
    alone that are not among the k largest (equations 13, 14). ``alternating``: L and S in turn, until they settle.
    reconstruction: ``additive``, L + S (equation 9), or ``masking``, S where it is not zero, L elsewhere (equation 10).
    rounds: of the search, at most.
    """

    density: float = 0.1
    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    share: float | str | None = None
    low_rank: str = "svd"
    method: str = "alternating"
    reconstruction: str = "additive"
    rounds: int = 40

    name: ClassVar[str] = "low-rank-sparse"
    summary: ClassVar[str] = "a low-rank format plus sparse values, each fitted to what the other leaves"
    rebuild: ClassVar[str] = (
        "low_rank + sparse.matrix.reshape(shape); masking: low_rank where sparse.matrix is 0, else it"
    )
    reference: ClassVar[str] = "Hawkins et al. 2021; alternating: Zhou & Tao 2011 (GoDec), Zhang & Papyan 2025 (OATS)"
    size_option: ClassVar[str] = "density"
    quick: ClassVar[bool] = True
    has_threshold: ClassVar[bool] = True
    adapts: ClassVar[bool] = True
    exact_bytes: ClassVar[bool] = False  # values of S may turn out to be zero

    def __post_init__(self) -> None:
        Sparse(self.density)
        if sum(size is not None for size in (self.rank, self.ranks, self.share)) > 1:
            raise FormatError(f"{self.name}: give one of rank, ranks and share")
        if self.share not in {None, AUTO} and not (_is_number(self.share) and 0 <= float(self.share or 0) <= 1):
            raise FormatError(f"{self.name}: share must be a fraction from 0 to 1, or auto, got {self.share!r}")
        if self.rank is not None:
            require_count(self.name, "rank", self.rank, least=0)
        for option, known in (("method", METHODS), ("reconstruction", RECONSTRUCTIONS)):
            if getattr(self, option) not in known:
                raise FormatError(f"{self.name}: {option} is one of {', '.join(known)}, got {getattr(self, option)!r}")
        require_count(self.name, "rounds", self.rounds)
        kind, options = parse_inner(self.name, "low_rank", self.low_rank)
        if self.ranks is not None and "ranks" not in kind.option_defaults():
            raise FormatError(f"{self.name}: {kind.name} has one rank, not several")
        size = {"ranks": self.ranks} if self.ranks is not None else {"rank": self.rank or 1}
        make(kind, {**options, **size})

    @classmethod
    def amounts(cls) -> set[str]:
        return {cls.size_option}  # the low-rank part may be given beside a budget

    @classmethod
    def suffices(cls, options: Mapping[str, Any]) -> bool:
        return any(options.get(size) not in {None, AUTO} for size in ("rank", "ranks", "share"))

    def kept(self, values: int) -> int:
        """Return how many of so many values the sparse part has."""
        return Sparse(self.density).kept(values)

    def low_rank_setting(self, shape: Shape) -> Format | None:
        """Return the low-rank part's format; None where there is no such part.

        Raises FormatError for share=auto, which needs a budget.
        """
        require_matrix_like(self.name, shape)
        kind, options = parse_inner(self.name, "low_rank", self.low_rank)
        if self.ranks is not None:
            return make(kind, {**options, "ranks": self.ranks})
        if self.rank is not None:
            return make(kind, {**options, "rank": self.rank}) if self.rank else None
        if self.share == AUTO:
            raise FormatError(f"{self.name}: share=auto looks for the best use of a budget; give keep")
        share = _USUAL_SHARE if self.share is None else float(self.share)
        elements = math.floor(share * math.prod(shape))
        return kind.within(shape, torch.float32, elements * torch.float32.itemsize, **options)

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        low, rest = self._low_rank_part(weight, self.low_rank_setting(tuple(weight.shape)))
        plain = self._together(weight, low, keep_largest(rest, self.kept(weight.numel())), rest)
        if gram is None:
            return plain
        moment = unit_moment(weight, gram)
        # Both are local optima, and either may be the better one.
        return best_for_output([self._fit_for_output(weight, moment), plain], weight, moment)

    def _fit_for_output(self, weight: Tensor, gram: Tensor) -> Factorization:
        shape, count, matrix = tuple(weight.shape), self.kept(weight.numel()), matrix_of(weight)
        inner = self.low_rank_setting(shape)
        if inner is not None and self._alternates(weight):
            solver = solver_for(inner, shape, gram)
            found, sparse = alternate_for_output(solver, weight, gram, count, self.rounds)
            low: Factorization | None = found
            rest = matrix - found.reconstruct().detach().reshape(matrix.shape)
        else:
            low, rest = self._low_rank_part(weight, inner, gram)
            scaled, exponent = scaled_to_unit(rest)
            sparse = sparse_in_metric(scaled, gram, lambda values: keep_largest(values, count))
            sparse = times_power_of_two(sparse, exponent) if exponent else sparse
        return self._together(weight, low, sparse, rest)

    def _together(self, weight: Tensor, low: Factorization | None, sparse: Tensor, rest: Tensor) -> Factorization:
        """Return L and S as a factorization; rest: A - L."""
        masking = self.reconstruction == "masking"
        if masking and low is not None:
            # Kept entries stand for themselves. For an output they also make good what others lack: S - (A - L) more.
            sparse = torch.where(sparse != 0, matrix_of(weight) + (sparse - rest), 0)
        return LowRankPlusSparse(tuple(weight.shape), low, SparseMatrix(tuple(weight.shape), sparse), masking=masking)

    def unpruned(self, weight: Tensor) -> Tensor:
        first = replace(self, method="residual") if self.method == "alternating" else self
        return first._low_rank_part(weight, self.low_rank_setting(tuple(weight.shape)))[1]

    def _alternates(self, weight: Tensor) -> bool:
        return self.method == "alternating" and 0 < self.kept(weight.numel()) < weight.numel()

    def _low_rank_part(
        self, weight: Tensor, inner: Format | None, gram: Tensor | None = None
    ) -> tuple[Factorization | None, Tensor]:
        """Return L, if there is to be any, and A - L as a matrix. gram: for the fit of all of A, where it is that."""
        if inner is None:
            return None, matrix_of(weight)
        count, shape = self.kept(weight.numel()), tuple(weight.shape)
        if self._alternates(weight):
            low = alternate(solver_for(inner, shape), weight, count, self.rounds)
        elif self.method == "masking" and 0 < count < weight.numel():
            low = fit_around(solver_for(inner, shape), weight, keep_largest(weight, count) != 0, self.rounds)
        else:
            low = inner.fit(weight, gram)
        return low, matrix_of(weight) - low.reconstruct().detach().reshape(matrix_of(weight).shape)

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        del nonzeros  # of the weight say nothing of what the low-rank part leaves
        inner = self.low_rank_setting(shape)
        low = {} if inner is None else inner.factor_specs(shape, dtype)
        matrix = FactorSpec((shape[0], fan_in(shape)), dtype, self.kept(math.prod(shape)))
        return {**{f"low_rank.{name}": spec for name, spec in low.items()}, "sparse.matrix": matrix}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        asked = cls(**{**options, "density": 0.0})
        kind, own = parse_inner(cls.name, "low_rank", asked.low_rank)
        given = asked.share != AUTO and (asked.share, asked.rank, asked.ranks) != (None, None, None)
        inner = replace(asked, share=None if asked.share == AUTO else asked.share).low_rank_setting(shape)
        if not given and inner is not None and inner.stored_bytes(shape, dtype) > budget_bytes // _OF_BUDGET:
            inner = kind.within(shape, dtype, budget_bytes // _OF_BUDGET, **own)
        return asked._around(inner)._filled(shape, dtype, budget_bytes)

    def _around(self, inner: Format | None) -> Self:
        size = {"rank": 0} if inner is None else sizes_of(inner)
        return replace(self, **{"rank": None, "ranks": None, "share": None, **size})

    def _filled(self, shape: Shape, dtype: torch.dtype, budget_bytes: int) -> Self | None:
        """Give what the low-rank part leaves of a budget to the sparse one; None where not one value fits."""
        values, inner = math.prod(shape), self.low_rank_setting(shape)
        rest = budget_bytes - (0 if inner is None else inner.stored_bytes(shape, dtype))
        matrix = (shape[0], fan_in(shape))

        def fits(kept: int) -> bool:
            return cheapest_bytes(FactorSpec(matrix, dtype, kept)) <= rest

        kept = largest(fits, values)
        return replace(self, density=kept / values) if kept > 0 else None

    @classmethod
    def best_within(cls, weight: Tensor, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        shape = tuple(weight.shape)
        if options.get("share") != AUTO:
            return cls.within(shape, dtype, budget_bytes, **options)
        asked = cls(**{**options, "density": 0.0, "share": None})
        kind, own = parse_inner(cls.name, "low_rank", asked.low_rank)
        found: dict[float, Self] = {}
        errors: dict[Self, float] = {}
        tried = sorted(_TRIED_SHARES)
        for _ in range(_REFINEMENTS + 1):
            for part in tried:
                inner = kind.within(shape, dtype, math.floor(part * budget_bytes), **own)
                setting = asked._around(inner)._filled(shape, dtype, budget_bytes)
                if setting is not None:
                    found[part] = setting
                    if setting not in errors:
                        errors[setting] = _error(weight, setting.quicker())
            if not found:
                return None
            tried = _beside(min(found, key=lambda part: errors[found[part]]), sorted(found))
        finalists = sorted(errors, key=errors.__getitem__)[:_FINALISTS]
        return min(finalists, key=lambda setting: _error(weight, setting))

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        shape, values = tuple(weight.shape), weight.numel()
        asked = cls(**{**options, "density": 0.0})
        setting = asked._around(asked.low_rank_setting(shape))
        rest = replace(setting, method="residual").unpruned(weight)
        lost = frobenius_norm(rest)
        allowed = 0.0 if lost == 0 else min(1.0, relative_error * frobenius_norm(weight) / lost)
        most = smallest_count_for_error(rest, allowed)
        failed = 0
        while setting.method != "residual" and most - failed > max(1, most // _FINENESS):
            middle = (failed + most) // 2
            if _error(weight, replace(setting, density=middle / values)) <= relative_error:
                most = middle
            else:
                failed = middle
        return replace(setting, density=most / values)

    @property
    def added_matrix(self) -> str | None:
        return "sparse.matrix" if self.reconstruction == "additive" else None

    @property
    def by_rows(self) -> bool:
        return self.low_rank == SVD.name

    def quicker(self) -> Self:
        return replace(self, rounds=min(self.rounds, FEW_ROUNDS))

    def richer(self, shape: Shape) -> Self | None:
        values = math.prod(shape)
        kept = self.kept(values)
        return None if kept >= values else replace(self, density=(kept + 1) / values)

    def pinned(self, shape: Shape) -> Self:
        inner = self.low_rank_setting(shape)
        return (
            self._around(inner)
            if inner is None
            else replace(self._around(inner), low_rank=text_of(inner.pinned(shape)))
        )

    def notes(self, shape: Shape) -> tuple[str, ...]:
        inner = self.low_rank_setting(shape)
        if inner is not None:
            return inner.notes(shape)
        return () if self.rank == 0 else ("its share is too small for a low-rank part",)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        require_matrix_like(self.name, shape)
        low = {name.removeprefix("low_rank."): f for name, f in factors.items() if name.startswith("low_rank.")}
        rest = {name.removeprefix("sparse."): f for name, f in factors.items() if name.startswith("sparse.")}
        if len(low) + len(rest) != len(factors):
            raise FormatError(f"{self.name}: has factors {sorted(factors)}, all begin with low_rank. or sparse.")
        try:
            kind, options = parse_inner(self.name, "low_rank", self.low_rank)
            size = {"ranks": self.ranks} if self.ranks is not None else {"rank": self.rank or 1}
            inner = make(kind, {**options, **size}).load(shape, low) if low else None
            sparse = Sparse(self.density).load(shape, rest)
        except FormatError as error:
            raise FormatError(f"{self.name}: {error.reason}") from error
        return LowRankPlusSparse(shape, inner, sparse, masking=self.reconstruction == "masking")


def _beside(best: float, tried: list[float]) -> list[float]:
    """Return the numbers half-way to the neighbours of the best one."""
    position = tried.index(best)
    return [
        (best + other) / 2 for other in (*tried[max(0, position - 1) : position], *tried[position + 1 : position + 2])
    ]


def _error(weight: Tensor, setting: Format) -> float:
    return compare(weight, setting.fit(weight).reconstruct().detach())[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
