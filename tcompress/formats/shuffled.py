"""shuffled: the entries in a random order that a seed tells, then any low-rank format.

A trained weight loses its structure that way, so this is worse than the format alone wherever there was any: it is the
control of `analyze`, and a format for weights that were trained in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError
from tcompress.formats.base import Factorization, Format, Shape, require_count
from tcompress.formats.for_output import refined
from tcompress.formats.inner import parse_inner, sizes_of, text_of
from tcompress.formats.options import make
from tcompress.linalg.permutation import shuffled, unshuffled

_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Shuffled(Format):
    """The format ``inner`` (a name, with options as ``tt:order=3``) at a rank, on entries shuffled by ``seed``."""

    rank: int | None = None
    ranks: tuple[int, ...] | None = None
    inner: str = "svd"
    seed: int = 0

    name: ClassVar[str] = "shuffled"
    summary: ClassVar[str] = "a low-rank format on randomly permuted entries: the control, which should be worse"
    rebuild: ClassVar[str] = "flat[numpy.random.RandomState(seed).permutation(flat.size)] = (weight of inner).flat"
    reference: ClassVar[str] = "Li et al. 2018 (randomly shuffled tensor decomposition)"
    size_option: ClassVar[str] = "rank"
    quick: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.ranks is None):
            raise FormatError("shuffled: give one of rank and ranks")
        require_count("shuffled", "seed", self.seed, least=0)
        if self.seed > _LARGEST_SEED:
            raise FormatError(f"shuffled: seed must be at most {_LARGEST_SEED}, got {self.seed}")
        kind, options = parse_inner("shuffled", "inner", self.inner)
        if self.ranks is not None and "ranks" not in kind.option_defaults():
            raise FormatError(f"shuffled: {kind.name} has one rank, not several")
        make(kind, {**options, **self._size()})

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        inner = self._format().fit(shuffled(weight, self.seed))
        return refined(ShuffledWeight(tuple(weight.shape), inner, self.seed), weight, gram)

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        specs = self._format().factor_specs(shape, dtype, nonzeros)
        return {f"inner.{name}": spec for name, spec in specs.items()}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        kind, own = parse_inner("shuffled", "inner", options.get("inner", cls.inner))
        return cls._around(kind.within(shape, dtype, budget_bytes, **own), options)

    @classmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        kind, own = parse_inner("shuffled", "inner", options.get("inner", cls.inner))
        seed = cls(**{**options, "rank": 1}).seed
        found = cls._around(kind.reaching(shuffled(weight, seed), relative_error, **own), options)
        assert found is not None, "reaching always finds a setting"  # noqa: S101
        return found

    def richer(self, shape: Shape) -> Self | None:
        return self._around(self._format().richer(shape), {"inner": self.inner, "seed": self.seed})

    def pinned(self, shape: Shape) -> Self:
        return replace(self, inner=text_of(self._format().pinned(shape)))

    def notes(self, shape: Shape) -> tuple[str, ...]:
        return self._format().notes(shape)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        strangers = [name for name in factors if not name.startswith("inner.")]
        if strangers:
            raise FormatError(f"shuffled: has factors {sorted(factors)}, all should begin with 'inner.'")
        own = {name.removeprefix("inner."): factor for name, factor in factors.items()}
        try:
            inner = self._format().load(shape, own)
        except FormatError as error:
            raise FormatError(f"shuffled: {error.reason}") from error
        return ShuffledWeight(shape, inner, self.seed)

    def _format(self) -> Format:
        kind, options = parse_inner("shuffled", "inner", self.inner)
        return make(kind, {**options, **self._size()})

    def _size(self) -> dict[str, Any]:
        return {"rank": self.rank} if self.ranks is None else {"ranks": self.ranks}

    @classmethod
    def _around(cls, inner: Format | None, options: Mapping[str, Any]) -> Self | None:
        """Return this format around a fitted-out inner one; None around none."""
        if inner is None:
            return None
        return cls(**{**options, **sizes_of(inner)})


class ShuffledWeight(Factorization):
    """inner: the factorization of the shuffled weight."""

    def __init__(self, shape: Shape, inner: Factorization, seed: int) -> None:
        super().__init__()
        self.shape, self.seed = shape, seed
        self.inner = inner

    def reconstruct(self) -> Tensor:
        return unshuffled(self.inner.reconstruct(), self.seed)
