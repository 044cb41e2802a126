"""What lies on disk for a factor: its values in some type, and the support that says where they belong.

Letters: a factor is (rows, columns) or any other shape, with ``nonzeros`` values whose bits are not all zero; a row is
an index of its first size. Bytes are known before there is any data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from tcompress.errors import InputError

# The integer type with the same width, through which values are compared bit by bit (-0.0 and NaN included) and
# handed to NumPy, which has no bfloat16.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # a marker that torch has without saying so
INT3: torch.dtype = torch.int3  # type: ignore[attr-defined]  # the same
CODED = (torch.int8, INT4, INT3)  # stored types that stand for codes with scales

# Takes the stored values, in their order, out of any tensor of the factor's shape; and puts them back between zeros.
Select = Callable[[Tensor], Tensor]
Place = Callable[[Tensor], Tensor]

_Part = TypeVar("_Part")


@dataclass(frozen=True)
class PartSpec:
    """Shape and type of one part, before or after it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FactorSpec:
    """Shape and stored type of a factor; the types int8, int4 and int3 stand for codes with scales.

    nonzeros: None for factors without zeros worth leaving out. skips: bytes of delta8 that hold no value; None where
    only a bound is known. pattern: (n, m), with at most n nonzeros in every m neighbours of a row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nonzeros: int | None = None
    skips: int | None = None
    pattern: tuple[int, int] | None = None

    @property
    def values(self) -> int:
        """Number of elements, zeros included."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Levels:
    """The values that codes can stand for: sign(c) * (|c| - shift) steps, for whole c from ``least`` to ``most``.

    first: the smallest |c|.
    """

    least: int
    most: int
    shift: float = 0.0
    first: int = 0

    def codes(self, multiples: Tensor) -> Tensor:
        """Return the codes nearest to values that are given as multiples of their steps, 0 for those that are 0."""
        return multiples.sign() * (multiples.abs() + self.shift).round()

    def nearest(self, values: Tensor, steps: Tensor, shift: Tensor | None = None) -> Tensor:
        """Return the nearest values that codes can stand for.

        steps: of each value; where it is 0 the value is 0. shift: in the place of this one, as a tensor ().
        """
        by = self.shift if shift is None else shift
        multiples = values / torch.where(steps == 0, math.inf, steps)
        sign = torch.where(multiples < 0, -1.0, 1.0)
        counts = (multiples.abs() + by).round_().clamp_min_(self.first)
        counts = torch.where(multiples < 0, counts.clamp_max(-self.least), counts.clamp_max(self.most))
        return sign * (counts - by) * steps


class Support(ABC):
    """Which elements are stored, in which order, and how that lies on disk."""

    name: str  # on disk; never changes its meaning once released
    part_names: tuple[str, ...]

    @abstractmethod
    def stored(self, factor: FactorSpec) -> tuple[int, ...] | None:
        """Return the shape of the stored values; None when this support cannot hold the factor."""

    @abstractmethod
    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        """Return what would lie on disk beside the values, for a factor that it can hold."""

    @abstractmethod
    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        """Return these parts of a contiguous CPU tensor, and what takes its stored values out of it."""

    @abstractmethod
    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        """Return the shape of the stored values, and what puts them where they belong.

        Raises InputError when the parts contradict each other or the shape.
        """

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        """Return what puts the stored values of sound parts where they belong, as ``Coding.unpack`` does it.

        It takes them in one list, or in their own shape, and ignores what follows the last of them.
        """


class Values(ABC):
    """How the stored values themselves lie on disk."""

    name: ClassVar[str | None]  # on disk, None for values as they are
    part_names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def parts(self, factor: FactorSpec, stored: tuple[int, ...]) -> dict[str, PartSpec] | None:
        """Return what would lie on disk for so many values; None when the factor is not to be stored like this."""

    @abstractmethod
    def encode(self, factor: Tensor, select: Select) -> dict[str, Tensor]:
        """Return the parts of a CPU tensor in its ``value_type``. Raises NumericalError where they cannot hold it."""

    @abstractmethod
    def decode(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], stored: tuple[int, ...], place: Place
    ) -> Tensor:
        """Return the factor. Raises InputError as ``Support.decode`` does."""

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], place: Place) -> Tensor:
        """Return the factor of sound parts, as ``Coding.unpack`` does."""

    def recoded(self, parts: Mapping[str, Tensor], codes: Tensor) -> Mapping[str, Tensor]:
        """Return the parts with other codes, whole numbers in the shape of the stored values, and the same scales."""
        raise NotImplementedError(f"values as {self.name or 'they are'} have no codes")

    def levels(self, parts: Mapping[str, Tensor]) -> Levels:
        """Return what the codes of these parts can stand for."""
        raise NotImplementedError(f"values as {self.name or 'they are'} have no codes")

    def single_steps(self, parts: Mapping[str, Tensor], stored: tuple[int, ...]) -> Mapping[str, Tensor]:
        """Return parts that stand for one step at each place of the stored values."""
        return self.recoded(parts, torch.ones(stored, dtype=torch.int8))


@dataclass(frozen=True)
class Coding:
    """A support and a way to hold the values on it. What decoding gives is encoded to the same values again."""

    support: Support
    held: Values

    @property
    def name(self) -> str:
        """The support's name on disk."""
        return self.support.name

    @property
    def values(self) -> str | None:
        """The name on disk of the way the values are held; None for values as they are."""
        return self.held.name

    @property
    def is_plain_tensor(self) -> bool:
        """Whether the factor is one tensor, which then has no name and needs no shape of its own."""
        return not self.support.part_names and self.held.name is None

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of the parts, the values first."""
        return ("",) if self.is_plain_tensor else (*self.held.part_names, *self.support.part_names)

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec] | None:
        """Return what would lie on disk, by part name; None when this coding is not for the factor."""
        stored = self.support.stored(factor)
        values = None if stored is None else self.held.parts(factor, stored)
        return None if values is None else self._named({**values, **self.support.parts(factor)})

    def nbytes(self, factor: FactorSpec) -> int | None:
        """Bytes of all parts on disk; None when this coding is not for the factor."""
        parts = self.parts(factor)
        return None if parts is None else sum(part.nbytes for part in parts.values())

    def encode(self, factor: Tensor) -> dict[str, Tensor]:
        """Return the parts of a CPU tensor in its ``value_type``. Raises NumericalError where they cannot hold it."""
        factor = factor.contiguous()
        where, select = self.support.encode(factor)
        return self._named({**self.held.encode(factor, select), **where})

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return the factor. Raises InputError when the parts contradict each other or the shape."""
        parts = self._own(parts)
        stored, place = self.support.decode(parts, shape)
        self._require_places(parts, stored)
        return self.held.decode(parts, shape, stored, place)

    def steps(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return for each element the step that its code counts, 0 where none is stored; for values held as codes."""
        stored, place = self.support.decode(parts, shape)
        return self.held.decode(self.held.single_steps(parts, stored), shape, stored, place)

    def levels(self, parts: Mapping[str, Tensor]) -> Levels:
        """Return which multiples of these steps the codes can stand for."""
        return self.held.levels(parts)

    def recoded(self, parts: Mapping[str, Tensor], codes: Tensor) -> dict[str, Tensor]:
        """Return the parts with other codes in the same places; codes: of the factor's shape, whole numbers."""
        shape = tuple(codes.shape)
        stored, place = self.support.decode(parts, shape)
        count = math.prod(stored)
        order = place(torch.arange(1, count + 1, dtype=torch.int64).reshape(stored)).reshape(-1)
        taken = torch.zeros(count, dtype=torch.int8)
        taken[order[order > 0] - 1] = codes.reshape(-1)[order > 0].to(torch.int8)
        return dict(self.held.recoded(parts, taken.reshape(stored)))

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Return the factor that ``decode`` returns, on the device of the parts and by torch operations alone.

        Only for parts that ``decode`` has accepted: nothing is checked, and nothing is read back from the device. No
        size depends on the parts' contents, so torch.compile and torch.export trace it whole. Gradients flow to values
        as they are; a plain tensor comes back itself.

        Beside the factor this takes a byte for each element, for int8 on a support two, for int4 on a support its
        values in float32, and for int3 up to 28 bytes for each stored value. Positions take 8 bytes for each stored
        value of csr, up to 24 of delta8, and up to 140 of elias-fano. On CUDA
        masked_scatter takes another 8 bytes for each element of bitmask and n:m.
        """
        parts = self._own(parts)
        return self.held.unpack(parts, shape, self.support.unpack(parts, shape))

    def _require_places(self, parts: Mapping[str, Tensor], stored: tuple[int, ...]) -> None:
        """Refuse values without any place: it is the places that are lost, and values alone would seem too many."""
        values, where = self.held.part_names[0], self.support.part_names
        is_lost = bool(where) and math.prod(stored) == 0 and parts[values].numel() > 0
        require(not is_lost, f"has {values}, but no places for them: its {' and '.join(where)} tell of none")

    def _own(self, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {self.held.part_names[0]: parts[""]} if self.is_plain_tensor else parts

    def _named(self, parts: dict[str, _Part]) -> dict[str, _Part]:
        return dict(zip(self.part_names, parts.values(), strict=True))


def value_type(stored: torch.dtype) -> torch.dtype:
    """Return the type that the values of a factor have in memory when it is stored as ``stored``."""
    return torch.float32 if stored in CODED else stored


def bits_of(tensor: Tensor) -> Tensor:
    """Return the values of a contiguous tensor as integers of the same width."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def require(condition: bool, problem: str) -> None:
    """Raise InputError with ``problem`` unless ``condition`` holds."""
    if not condition:
        raise InputError(problem)
