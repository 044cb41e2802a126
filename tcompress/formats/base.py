"""The contract of every decomposition: a Format decides, a Factorization holds the result.

Letters: a weight is ``(out, in)``, ``(out, in / groups, *kernel)`` or ``(rows, width)``; its matricisation is
``(out, fan_in)`` with ``fan_in`` the product of all sizes but the first.

Laws, held by tests for every format: reconstruct() has the weight's shape; more stored bytes never mean a larger
error; running through the factors equals the dense operation on reconstruct(); load(shape, factors) is identical;
stored_bytes bounds the bytes on disk; within() fits and one step richer does not; pinned() gives the same factors;
fit is deterministic and leaves its input unchanged; no fit returns NaN; a fit that knows the second moment of the
layer's input leaves no larger error of the output than one that does not.

Operations are counted in multiplications per input, with the dense weight taken to be at hand: that is how a model
that runs often would hold it.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.errors import FormatError
from tcompress.formats.effort import dense_effort
from tcompress.formats.outlook import Outlook
from tcompress.formats.pattern import Patterns

Shape = tuple[int, ...]

CONV: Mapping[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Factorization(nn.Module, ABC):
    """The factors of one weight: its state_dict is what goes to disk, so ranks are read off the shapes."""

    shape: Shape
    calls: ClassVar[int] = 2  # into the library, on the way through the factors
    slowness: ClassVar[float] = 1.0  # of a multiplication on that way, beside one of a plain product

    @abstractmethod
    def reconstruct(self) -> Tensor:
        """Return the dense weight, of ``self.shape``."""

    def scale_rows(self, scales: Tensor) -> None:
        """Multiply each row of the weight, in place, by one of ``scales``, (out,): for formats ``by_rows`` alone."""
        raise NotImplementedError(f"{type(self).__name__} does not keep rows apart")

    def forward(self, operation: str, *inputs: Tensor, **geometry: Any) -> Tensor:
        """Run the operation of that name: the one door through which factors can be replaced for a call."""
        result: Tensor = getattr(self, operation)(*inputs, **geometry)
        return result

    def prepared(self) -> Factorization:
        """Return an equal factorization that does nothing twice which does not depend on the input; without gradients.

        It may hold more memory than the factors, and is meant to be thrown away when they change.
        """
        return self

    def on_places(self, patterns: Patterns) -> tuple[Factorization, frozenset[str]]:
        """Return the same factorization for training, and which factors it then takes as their values at places alone.

        patterns: of sparse factors that learn, by name. Those that it makes no use of are given dense, as ever.
        """
        del patterns
        return self, frozenset()

    def can_compile(self) -> bool:
        """Tell whether a compiler understands the way through the factors."""
        return True

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        """Return how long n positions take through the factors, in the unit of ``effort.py``."""
        operations = self.slowness * self.operations(groups=groups, steps=steps)
        return dense_effort(operations, n, calls=self.calls)

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        """Multiplications per output position on the way through the factors; the dense weight's where there is none.

        groups: of the convolution. steps: input positions per output position, the product of its strides.
        """
        del groups, steps
        return math.prod(self.shape)

    def rebuilding(self) -> int:
        """Multiplications of ``reconstruct``, at least."""
        return math.prod(self.shape)

    def saves(self, **geometry: Any) -> bool:
        """Tell whether the way through the factors takes fewer multiplications than the dense weight."""
        stride = geometry.get("stride", 1)
        strides = (stride,) if isinstance(stride, int) else tuple(stride)
        steps = strides[0] ** max(0, len(self.shape) - 2) if len(strides) == 1 else math.prod(strides)
        return self.operations(groups=int(geometry.get("groups", 1)), steps=steps) < math.prod(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T`` for x: (..., in)."""
        return F.linear(x, self.reconstruct())

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        """Return the convolution of x: (batch, channels, *sizes); geometry: stride, padding, dilation, groups."""
        return CONV[len(self.shape)](x, self.reconstruct(), **geometry)

    def embedding(self, ids: Tensor) -> Tensor:
        """Return the rows of the weight for integer ids of any shape: (*ids.shape, width)."""
        return F.embedding(ids, self.reconstruct())


class Format(ABC):
    """A decision such as "svd with rank 16": subclasses are frozen dataclasses of plain values.

    name: on disk, in plans and on the command line; never changes its meaning once released.
    size_option: the field that says how much is kept; the other fields have defaults.

    Every method that takes a shape raises FormatError where the setting cannot be applied to it.
    """

    name: ClassVar[str]
    summary: ClassVar[str]  # one line for people
    rebuild: ClassVar[str]  # the formula by which a stranger gets the weight from the factors
    reference: ClassVar[str]  # the paper
    size_option: ClassVar[str]
    rank_option: ClassVar[str | None] = "rank"  # what --rank sets; None for a format that has nothing of the kind
    has_threshold: ClassVar[bool] = False  # keeps values by magnitude, so that layers can share one threshold
    quick: ClassVar[bool]  # fitted in seconds, so that `analyze` tries it unasked
    adapts: ClassVar[bool] = False  # best_within looks at the weight
    has_price: ClassVar[bool] = False  # fit_at_price finds the ranks
    exact_bytes: ClassVar[bool] = True  # known before the fit; else stored_bytes is an upper bound until then

    @abstractmethod
    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        """Return the best factorization of a finite float32 weight that this setting allows.

        gram: the second moment E[x xT] of the layer's input, (fan_in, fan_in), or its diagonal (fan_in,), or one block
        (b, b), b a divisor of fan_in, that stands on its diagonal again and again with zeros elsewhere. With it the
        error of the layer's output becomes small, tr(E G ET) for E = weight - reconstruction as (out, fan_in), and is
        never larger than that of the fit without; None stands for the identity.
        Pure and deterministic. Raises NumericalError when the computation breaks down, or gram is no second moment.
        """

    def fit_at_price(self, weight: Tensor, price: float) -> Factorization:
        """Return the factorization that minimises ||weight - reconstruction||^2 + price * values of its factors.

        Ranks are free, the other options are those of the setting; no rank is 0 where that would leave nothing. For
        formats that have a price. weight: as of ``fit``. Raises NumericalError as that does.
        """
        raise NotImplementedError(f"{type(self).__name__} has no ranks that a price decides")

    def sized_as(self, factors: Factorization) -> Self:
        """Return the same setting with the amount that such factors have, where it says one that can be read off."""
        del factors
        return self

    def unpruned(self, weight: Tensor) -> Tensor:
        """Return the values from which the largest are kept, (out, fan_in), for formats that have a threshold.

        weight: finite, float32 or float64. Of a low-rank plus sparse weight: what the low-rank part leaves.
        """
        return matrix_of(weight)

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

    @classmethod
    def best_within(cls, weight: Tensor, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        """Return the setting that serves this very weight best within the budget; ``within`` where all do alike."""
        return cls.within(tuple(weight.shape), dtype, budget_bytes, **options)

    @abstractmethod
    def richer(self, shape: Shape) -> Self | None:
        """Return the next setting with a smaller error; None at full size."""

    @abstractmethod
    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        """Return the factorization that ``factors`` (a state_dict) describe. Raises FormatError when they do not.

        Sizes are those of the factors, not of the setting: an old file says what it holds.
        """

    def pinned(self, shape: Shape) -> Self:
        """Return the same setting with everything written out that it takes from the shape by rules of its own.

        Files carry the pinned setting, so that they stay readable when such a rule is made better.
        """
        del shape
        return self

    @property
    def added_matrix(self) -> str | None:
        """Name of the factor that is added to the weight's matrix as it is, (out, fan_in); None where there is none."""
        return None

    @property
    def by_rows(self) -> bool:
        """Whether a setting means the same for some of the rows, and for rows of other sizes, as a rank does."""
        return False

    def quicker(self) -> Self:
        """Return the same setting, fitted with less patience: for fits that are only to be compared with others."""
        return self

    def notes(self, shape: Shape) -> tuple[str, ...]:
        """Return what a user should know of this setting on this shape: ranks that are clipped, sizes padded."""
        del shape
        return ()

    @classmethod
    def sweep(cls, weight: Tensor, settings: Sequence[Self]) -> Iterator[Factorization]:
        """Fit several settings to one weight, in their order; formats share work between them where they can."""
        for setting in settings:
            yield setting.fit(weight)

    @classmethod
    def outlook(cls, weight: Tensor) -> Outlook | None:
        """Return what settings will lose on this weight, fitted without a moment; None where that is not known.

        Options that do not say how much is kept are at their defaults.
        """
        del weight
        return None

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
    def amounts(cls) -> set[str]:
        """Return the options of which one says how much is kept, unless a budget does."""
        return {cls.size_option, "ranks"}

    @classmethod
    def suffices(cls, options: Mapping[str, Any]) -> bool:
        """Tell whether these options say how much is kept though none of ``amounts`` is among them."""
        del options
        return False

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return every option and its default; None where one must be given."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # as above
        return {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}

    def __str__(self) -> str:
        return ":".join([self.name, *(_option_text(name, value) for name, value in self.options().items())])


def listed(values: Iterable[object]) -> str:
    """Return values for a message: 4,8,4."""
    return ",".join(map(str, values))


def as_text(value: Any) -> str:
    """Return an option's value as the command line takes it: lists with commas, one after the only entry as well."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value)) + ("," if len(value) == 1 else "")
    return "null" if value is None else str(value)


def _option_text(name: str, value: Any) -> str:
    """Return ``name=value``; the options of a format in a format carry its name: ``inner=tt:inner.order=3``."""
    text = f"{name}={as_text(value)}"
    return text.replace(":", f":{name}.") if isinstance(value, str) else text


def fan_in(shape: Shape) -> int:
    """Values per output: the columns of the matricisation."""
    return math.prod(shape[1:])


def matrix_of(weight: Tensor) -> Tensor:
    """Return the (out, fan_in) matricisation, as a view."""
    return weight.reshape(weight.shape[0], -1)


def require_count(name: str, option: str, value: Any, *, least: int = 1) -> None:
    """Raise FormatError unless ``value`` is a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise FormatError(f"{name}: {option} must be a whole number of at least {least}, got {value!r}")


def require_matrix_like(name: str, shape: Shape) -> None:
    """Raise FormatError unless a weight of this shape has a matricisation."""
    if len(shape) < 2 or 0 in shape:
        raise FormatError(f"{name}: a weight needs two or more sizes above zero, got {shape}")


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest count in 0..most that fits, by bisection; 0 when none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def take_factors(name: str, factors: Mapping[str, Tensor], *expected: str) -> list[Tensor]:
    """Return the factors in the order asked for. Raises FormatError when names are missing or left over."""
    if set(factors) != set(expected):
        raise FormatError(f"{name}: has factors {sorted(factors)}, needs {sorted(expected)}")
    return [factors[key] for key in expected]
