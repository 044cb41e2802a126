"""reshaped-sum: weight ~ a sum of low-rank matrices, each of them low-rank in a matricisation of its own.

Letters: W = weight; T_t = term t, of rank r_t in reshape t; b_t = values stored for one rank of it.
Reshapes: channel and spatial, those of svd; paired, (i1 j1) x (i2 j2), that of a ttm with two cores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError
from tcompress.formats.addends import SumOfTerms
from tcompress.formats.base import Factorization, Format, Shape, largest, listed, require_count, require_matrix_like
from tcompress.formats.for_output import refined
from tcompress.formats.search import smallest_reaching
from tcompress.formats.svd import SVD
from tcompress.formats.ttm import TTMatrix
from tcompress.linalg.distance import frobenius_norm
from tcompress.linalg.scaling import scaled_to_unit
from tcompress.linalg.svd import rank_at_price, singular_values

RESHAPES = ("channel", "spatial", "paired")
_SWEEPS = 30
_GAIN = 1e-4  # relative, by which a sweep must lower the error to be followed by another
_CHOICE_SWEEPS = 3  # per candidate of the penalty: each starts from the terms of the one before
_CHOICE_STEPS = 10
_PRICE_SWEEPS = 10  # as in the authors' program


@dataclass(frozen=True)
class ReshapedSum(Format):
    """A rank for every term, or ``ranks``, one for each (0 leaves the term out).

    reshapes: of the terms; None takes channel and spatial for kernels, channel and paired for matrices.
    out_modes, in_modes, padding: of the paired term, as in ttm.
    """

    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    reshapes: tuple[str, ...] | None = None
    out_modes: tuple[int, ...] | None = None
    in_modes: tuple[int, ...] | None = None
    padding: tuple[int, int] = (0, 0)

    name: ClassVar[str] = "reshaped-sum"
    summary: ClassVar[str] = "sum of low-rank matrices of different reshapes, by alternating projections"
    rebuild: ClassVar[str] = "sum of the terms.n in reshapes[n]: channel and spatial as svd, paired as ttm"
    reference: ClassVar[str] = "Idelbayev & Carreira-Perpinan 2021"
    size_option: ClassVar[str] = "rank"
    quick: ClassVar[bool] = False
    adapts: ClassVar[bool] = True
    has_price: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.ranks is None):
            raise FormatError("reshaped-sum: give one of rank and ranks")
        if self.rank is not None:
            require_count(self.name, "rank", self.rank)
        if self.ranks is not None and (type(self.ranks) is not tuple or not self.ranks):
            raise FormatError(f"reshaped-sum: ranks is a list of whole numbers as 8,4, got {self.ranks!r}")
        for rank in self.ranks or ():
            require_count(self.name, "ranks", rank, least=0)
        if self.ranks is not None and not any(self.ranks):
            raise FormatError("reshaped-sum: one of the ranks must be above 0")
        names = self.reshapes
        if names is not None and (type(names) is not tuple or not names or any(name not in RESHAPES for name in names)):
            raise FormatError(f"reshaped-sum: reshapes is a list of {', '.join(RESHAPES)}, got {names!r}")
        self._paired(1)
        for modes in (self.out_modes, self.in_modes):
            if modes is not None and len(modes) != 2:
                raise FormatError(f"reshaped-sum: the paired term has two modes a side, got {listed(modes)}")

    def terms(self, shape: Shape) -> list[Format | None]:
        """Return the format of each term, None where its rank is 0."""
        return [self._term(name, rank) if rank else None for name, rank in zip(*self._plan(shape), strict=True)]

    def _plan(self, shape: Shape) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the reshapes and their ranks, clipped."""
        require_matrix_like(self.name, shape)
        has_kernel = math.prod(shape[2:]) > 1
        names = self.reshapes or (("channel", "spatial") if has_kernel else ("channel", "paired"))
        if has_kernel and "paired" in names:
            raise FormatError(f"reshaped-sum: paired is for matrices, not for a kernel of {shape[2:]}")
        ranks = self.ranks if self.ranks is not None else (self.rank or 1,) * len(names)
        if len(ranks) != len(names):
            raise FormatError(f"reshaped-sum: {len(ranks)} ranks are given for {len(names)} terms")
        full = [_full_rank(self._term(name, 1), shape) for name in names]
        return names, tuple(map(min, ranks, full))

    def _term(self, name: str, rank: int) -> Format:
        if name == "paired":
            return self._paired(rank)
        return SVD(rank=rank, matricisation=name)

    def _paired(self, rank: int) -> TTMatrix:
        return TTMatrix(rank=rank, out_modes=self.out_modes, in_modes=self.in_modes, padding=self.padding)

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        return {
            f"terms.{position}.{name}": spec
            for position, term in enumerate(self.terms(shape))
            if term is not None
            for name, spec in term.factor_specs(shape, dtype, nonzeros).items()
        }

    def pinned(self, shape: Shape) -> Self:
        names, _ = self._plan(shape)
        if "paired" not in names:
            return replace(self, reshapes=names)
        paired = self._paired(1).pinned(shape)
        return replace(
            self, reshapes=names, out_modes=paired.out_modes, in_modes=paired.in_modes, padding=paired.padding
        )

    def notes(self, shape: Shape) -> tuple[str, ...]:
        return tuple(
            f"term {position}: {note}"
            for position, (name, rank) in enumerate(zip(self._plan(shape)[0], self._asked(shape), strict=True))
            if rank
            for note in self._term(name, rank).notes(shape)
        )

    def _asked(self, shape: Shape) -> tuple[int, ...]:
        return self.ranks if self.ranks is not None else (self.rank or 1,) * len(self._plan(shape)[0])

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        return refined(SumOfTerms(tuple(weight.shape), self._alternate(weight, _SWEEPS)[0]), weight, gram)

    def _alternate(self, weight: Tensor, sweeps: int) -> tuple[list[Factorization | None], float]:
        """Return the terms and their error, each in turn made the best one of what the others leave."""
        terms = self.terms(tuple(weight.shape))
        found: list[Factorization | None] = [None] * len(terms)
        parts = [torch.zeros_like(weight)] * len(terms)
        norm = error = frobenius_norm(weight)
        rest = weight
        for sweep in range(sweeps):
            improved, new_parts, left = list(found), list(parts), rest
            for position, term in enumerate(terms):
                if term is not None:
                    target = left + new_parts[position]
                    fitted = improved[position] = term.fit(target)
                    new_parts[position] = fitted.reconstruct().detach()
                    left = target - new_parts[position]
            before, after = error, frobenius_norm(left)
            if after > before and sweep > 0:  # rounding, where the error is that small
                break
            found, parts, rest, error = improved, new_parts, left, after
            if before - error <= _GAIN * before or error <= _GAIN * norm or terms.count(None) == len(terms) - 1:
                break
        return found, error

    def fit_at_price(self, weight: Tensor, price: float) -> Factorization:
        """Alternate over the terms: each in turn has its best rank and values beside the others, which is closed form.

        No sweep ends with a larger sum of error and price than the one before, but where it ends is a local optimum:
        one term alone is taken where that is better.
        """
        shape = tuple(weight.shape)
        prices = [price * cost for cost in self._costs(shape)]
        parts = [torch.zeros_like(weight) for _ in prices]
        found, paid = self._sweep_at(weight, prices, parts)
        for _ in range(_PRICE_SWEEPS - 1):
            before = paid
            found, paid = self._sweep_at(weight, prices, parts)
            if paid >= before - _GAIN * before:
                break
        best, least = (found, paid) if any(found) else ([], math.inf)
        for position, name in enumerate(self._plan(shape)[0]):
            rank = max(1, rank_at_price(singular_values(_matrix(self._term(name, 1), weight)), prices[position]))
            alone = self._term(name, rank).fit(weight)
            cost = _lost(weight, alone) + rank * prices[position]
            if cost < least:
                best, least = [alone if at == position else None for at in range(len(prices))], cost
        return SumOfTerms(shape, best)

    def _sweep_at(
        self, weight: Tensor, prices: Sequence[float], parts: list[Tensor]
    ) -> tuple[list[Factorization | None], float]:
        """Give each term in turn the rank and the values that are best beside the others, at so much for one rank.

        parts: the weights of the terms, which are changed. Returns the terms, and their error squared with their price.
        """
        found, paid = list[Factorization | None](), 0.0
        for position, name in enumerate(self._plan(tuple(weight.shape))[0]):
            target = weight - (sum(parts, torch.zeros_like(weight)) - parts[position])
            rank = rank_at_price(singular_values(_matrix(self._term(name, 1), target)), prices[position])
            fitted = self._term(name, rank).fit(target) if rank else None
            parts[position] = torch.zeros_like(weight) if fitted is None else fitted.reconstruct().detach()
            paid += rank * prices[position]
            found.append(fitted)
        return found, frobenius_norm(weight - sum(parts)) ** 2 + paid

    def _costs(self, shape: Shape) -> list[int]:
        """Return the values that are stored for one rank of each term."""
        singles = [self._term(name, 1) for name in self._plan(shape)[0]]
        return [sum(spec.values for spec in term.factor_specs(shape, torch.float32).values()) for term in singles]

    def sized_as(self, factors: Factorization) -> Self:
        assert isinstance(factors, SumOfTerms), "they are this format's"  # noqa: S101
        terms = dict(factors.terms.items())
        ranks = tuple(_rank_of(terms.get(str(at))) for at in range(len(self._plan(factors.shape)[0])))
        return replace(self, rank=None, ranks=ranks)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        terms, left = [], dict(factors)
        for position, name in enumerate(self._plan(shape)[0]):
            prefix = f"terms.{position}."
            own = {key.removeprefix(prefix): left.pop(key) for key in factors if key.startswith(prefix)}
            try:
                terms.append(self._term(name, 1).load(shape, own) if own else None)
            except FormatError as error:
                raise FormatError(f"reshaped-sum: term {position}: {error.reason}") from error
        if left or not any(terms):
            raise FormatError(f"reshaped-sum: has factors {sorted(factors)}, needs those of {len(terms)} terms")
        return SumOfTerms(shape, terms)

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        def fits(rank: int) -> bool:
            return rank == 0 or cls(**{**options, "rank": rank}).stored_bytes(shape, dtype) <= budget_bytes

        rank = largest(fits, cls(**{**options, "rank": 1})._most(shape))
        return cls(**{**options, "rank": rank}) if rank else None

    @classmethod
    def best_within(cls, weight: Tensor, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        """Return the ranks that the penalised problem chooses, or one rank for all or one term alone if better."""
        shape = tuple(weight.shape)
        any_rank = cls(**{**options, "rank": 1})

        def fits(ranks: tuple[int, ...]) -> bool:
            return not any(ranks) or cls(**options, ranks=ranks).stored_bytes(shape, dtype) <= budget_bytes

        candidates = [cls.within(shape, dtype, budget_bytes, **options)]
        candidates += [cls(**options, ranks=ranks) for ranks in any_rank._candidates(weight, fits) if any(ranks)]
        fitting = [each for each in candidates if each and each.stored_bytes(shape, dtype) <= budget_bytes]
        if not fitting:
            return None
        return min(fitting, key=lambda each: each._alternate(weight, _SWEEPS)[1])

    def _candidates(self, weight: Tensor, fits: Callable[[tuple[int, ...]], bool]) -> Iterator[tuple[int, ...]]:
        """Yield ranks that fit: each term alone, then the penalised choice."""
        shape = tuple(weight.shape)
        names, _ = self._plan(shape)
        for position, name in enumerate(names):

            def alone(rank: int, position: int = position) -> tuple[int, ...]:
                return tuple(rank if other == position else 0 for other in range(len(names)))

            yield alone(largest(lambda rank: fits(alone(rank)), _full_rank(self._term(name, 1), shape)))
        yield self._penalised(weight, self._costs(shape), fits)

    def _penalised(
        self, weight: Tensor, costs: Sequence[int], fits: Callable[[tuple[int, ...]], bool]
    ) -> tuple[int, ...]:
        """Return the ranks that minimise ||W - sum T||^2 + penalty * values, at the least penalty that fits.

        For one term with the others fixed the choice is in closed form: keep the singular values whose square exceeds
        penalty times cost (the cost is linear in the rank). Alternated as in `fit`; the penalty by bisection.
        """
        weight = scaled_to_unit(weight)[0]  # what is squared here must not leave the range
        low, high = 0.0, frobenius_norm(weight) ** 2 / min(costs)
        best: tuple[int, ...] = (0,) * len(costs)
        parts = [torch.zeros_like(weight) for _ in costs]
        for _ in range(_CHOICE_STEPS):
            penalty = math.sqrt(max(low, high * 1e-8) * high)
            for _ in range(_CHOICE_SWEEPS):
                found, _ = self._sweep_at(weight, [penalty * cost for cost in costs], parts)
            ranks = tuple(map(_rank_of, found))
            if fits(ranks):
                best, high = ranks, penalty
            else:
                low = penalty
        return best

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        most = cls(**{**options, "rank": 1})._most(tuple(weight.shape))
        return smallest_reaching(weight, relative_error, lambda rank: cls(**{**options, "rank": rank}), most)

    def richer(self, shape: Shape) -> Self | None:
        names, ranks = self._plan(shape)
        full = [_full_rank(self._term(name, 1), shape) for name in names]
        if all(rank >= most for rank, most in zip(ranks, full, strict=True)):
            return None
        if self.rank is not None:
            return replace(self, rank=self.rank + 1)
        return replace(self, ranks=tuple(min(rank + 1, most) for rank, most in zip(ranks, full, strict=True)))

    def _most(self, shape: Shape) -> int:
        return max(_full_rank(self._term(name, 1), shape) for name in self._plan(shape)[0])


def _full_rank(term: Format, shape: Shape) -> int:
    """Return the rank of the term's matricisation beyond which nothing is gained."""
    if isinstance(term, TTMatrix):
        return term.full_ranks(term.folding(shape))[0]
    assert isinstance(term, SVD)  # noqa: S101
    return min(term.sizes(shape))


def _matrix(term: Format, weight: Tensor) -> Tensor:
    if isinstance(term, TTMatrix):
        folded = term.folding(tuple(weight.shape)).fold(weight)
        return folded.reshape(folded.shape[0], -1)
    assert isinstance(term, SVD)  # noqa: S101
    return term.matrix(weight)


def _rank_of(term: nn.Module | None) -> int:
    """Return the last size of a term's first factor, which is its rank in every reshape; 0 for no term."""
    return 0 if term is None else next(term.parameters()).shape[-1]


def _lost(weight: Tensor, term: Factorization) -> float:
    return frobenius_norm(weight - term.reconstruct().detach()) ** 2
