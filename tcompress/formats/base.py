"""The contract of every decomposition: a Format decides, a Factorization holds the result.

Letters: a weight is ``(out, in)``, ``(out, in / groups, *kernel)`` or ``(rows, width)``; its matricisation is
``(out, fan_in)`` with ``fan_in`` the product of all sizes but the first.

Laws, held by tests for every format: reconstruct() has the weight's shape; more stored bytes never mean a larger
error; running through the factors equals the dense operation on reconstruct(); load(shape, factors) is identical;
stored_bytes bounds the bytes on disk; within() fits and one step richer does not; fit is deterministic and leaves its
input unchanged; no fit returns NaN.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.errors import FormatError

Shape = tuple[int, ...]

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Factorization(nn.Module, ABC):
    """The factors of one weight: its state_dict is what goes to disk, so ranks are read off the shapes."""

    shape: Shape

    @abstractmethod
    def reconstruct(self) -> Tensor:
        """Return the dense weight, of ``self.shape``."""

    def linear(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` for x: (..., in)."""
        return F.linear(x, self.reconstruct())

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        """Return the convolution of x: (batch, channels, *sizes); geometry: stride, padding, dilation, groups."""
        result: Tensor = _CONV[len(self.shape)](x, self.reconstruct(), **geometry)
        return result

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows of the weight for integer ids of any shape: (*ids.shape, width)."""
        return F.embedding(ids, self.reconstruct())


class Format(ABC):
    """A decision such as "svd with rank 16": subclasses are frozen dataclasses of plain values.

    name: on disk, in plans and on the command line; never changes its meaning once released.
    size_option: the field that says how much is kept; the other fields have defaults.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for people
    rebuild: ClassVar[str]  # the formula by which a stranger gets the weight from the factors
    reference: ClassVar[str]  # the paper
    size_option: ClassVar[str]
    has_threshold: ClassVar[bool] = False  # keeps values by magnitude, so that layers can share one threshold
    quick: ClassVar[bool]  # fitted in seconds, so that `analyze` tries it unasked

    @abstractmethod
    def fit(self, weight: Tensor) -> Factorization:
        """Return the best factorization of a finite float32 weight that this setting allows.

        Pure and deterministic. Raises NumericalError when the computation breaks down.
        """

    @abstractmethod
    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        """Return shape and nonzeros of every factor of a weight, before it is fitted.

        nonzeros: how many values of the weight are not zero, where the caller knows; it makes sparse factors exact.
        """

    @classmethod
    @abstractmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        """Return the richest setting whose factors, stored as ``dtype``, fit the budget; None when none does."""

    @classmethod
    @abstractmethod
    def reaching(cls, weight: Tensor, relative_error: float, **options: Any) -> Self:
        """Return the smallest setting whose error in exact arithmetic is at most ``relative_error``."""

    @abstractmethod
    def richer(self, shape: Shape) -> Self | None:
        """Return the next setting with a smaller error; None at full size."""

    @classmethod
    @abstractmethod
    def load(cls, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        """Return the factorization that ``factors`` (a state_dict) describe. Raises FormatError when they do not."""

    @classmethod
    def sweep(cls, weight: Tensor, settings: Sequence[Self]) -> Iterator[Factorization]:
        """Fit several settings to one weight, in their order; formats share work between them where they can."""
        for setting in settings:
            yield setting.fit(weight)

    def stored_bytes(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> int:
        """Bytes of all factors on disk, each in its cheapest encoding: an upper bound, exact when nonzeros is given."""
        return sum(cheapest_bytes(factor) for factor in self.factor_specs(shape, dtype, nonzeros).values())

    def options(self) -> dict[str, Any]:
        """Return the fields that are not at their default, ready for JSON."""
        return {
            field.name: value
            for field in dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass
            if (value := getattr(self, field.name)) != field.default
        }

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return every option and its default; None where one must be given."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # as above
        return {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{name}={value}" for name, value in self.options().items())])


def fan_in(shape: Shape) -> int:
    """Values per output: the columns of the matricisation."""
    return math.prod(shape[1:])


def matrix_of(weight: Tensor) -> Tensor:
    """Return the (out, fan_in) matricisation, as a view."""
    return weight.reshape(weight.shape[0], -1)


def require_matrix_like(name: str, shape: Shape) -> None:
    """Raise FormatError unless a weight of this shape has a matricisation."""
    if len(shape) < 2 or 0 in shape:
        raise FormatError(f"{name}: a weight needs two or more sizes above zero, got {shape}")


def take_factors(name: str, factors: Mapping[str, Tensor], *expected: str) -> list[Tensor]:
    """Return the factors in the order asked for. Raises FormatError when names are missing or left over."""
    if set(factors) != set(expected):
        raise FormatError(f"{name}: has factors {sorted(factors)}, needs {sorted(expected)}")
    return [factors[key] for key in expected]
