"""Errors of a layer against its size, format by format, beside those of the same values in random order.

No setting is fitted: one decomposition for each unfolding says what every rank leaves out, one sorting what every
number of kept values does. Errors are relative, in the Frobenius norm, before factors are rounded to a stored type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import Statistics
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import Format
from tcompress.formats.base import as_text, largest
from tcompress.formats.folded import Folded
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.linalg.output_error import require_moment, root_of
from tcompress.linalg.permutation import shuffled
from tcompress.linalg.scaling import scaled_to_unit
from tcompress.workflow.error_bounds import NO_TELLING, TOLD, Bounds, bounds_of
from tcompress.workflow.fitting import working_copy
from tcompress.workflow.plan import Target
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.settings import Settings
from tcompress.workflow.survey import facts_of

ERRORS = (0.3, 0.1)  # of which it is told how many bytes they need
_POINTS = 40  # of a curve, at most
_SEED = 0  # of the order of the control


@dataclass(frozen=True)
class CurvePoint:
    """One setting. fraction: elements of its factors over those of the weight. stored_bytes: in the stored type.

    error: what the fit's cannot exceed; lower: what it cannot be below. Of an exact curve the two are one. control,
    control_lower: the same of the shuffled weight.
    """

    setting: Format
    fraction: float
    stored_bytes: int
    error: float
    lower: float
    control: float
    control_lower: float


@dataclass(frozen=True)
class Needed:
    """The fewest bytes at which ``CurvePoint.error`` is at most ``error``, and at which ``control`` is.

    None: no setting with at most the weight's own number of elements has so small an error.
    """

    error: float
    stored_bytes: int | None
    control_bytes: int | None


@dataclass(frozen=True)
class ErrorCurve:
    """The errors of one format, named with its options, on one layer, smallest first; or the ``reason`` for none.

    of_output: they are errors of the layer's output, ||(W - W') C|| over ||W C|| with C CT the second moment of its
    input, not of its weight. needed: for each of ERRORS, from all sizes, not from the points alone.
    """

    layer: Layer
    format: str
    of_output: bool = False
    points: tuple[CurvePoint, ...] = ()
    needed: tuple[Needed, ...] = ()
    reason: str | None = None

    @property
    def is_exact(self) -> bool:
        """Whether errors are those of the best of each size, which the format's fit finds, and not bounds."""
        return all(each.lower == each.error and each.control_lower == each.control for each in self.points)


def error_curves(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    choices: Sequence[Format | Target],
    *,
    statistics: Statistics | None = None,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> list[ErrorCurve]:
    """Return the curve of each layer and each different format among the choices, whatever their sizes.

    statistics: of this very checkpoint (``require_source`` tells): with them errors are those of outputs, where a
    layer's are known. A layer that is not finite, and a format that cannot be told, have a reason in the place of
    points.
    """
    settings, families = settings or Settings(), list(_families(choices))
    if not families:
        return []
    return [
        curve
        for layer in steps("curves", layers, progress)
        for curve in _of_layer(checkpoint.read(layer.name), layer, families, statistics, settings)
    ]


@dataclass(frozen=True)
class _Family:
    """A format with all options but its size."""

    format: type[Format]
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return ":".join([self.format.name, *(f"{name}={as_text(value)}" for name, value in self.options.items())])

    def first(self) -> Format:
        """Return one of its settings. Raises FormatError when no curve of it can be told."""
        if not issubclass(self.format, TOLD):
            raise FormatError(NO_TELLING)
        return self.of_size(1, 1)

    def of_size(self, size: int, values: int) -> Format:
        """Return the setting of a rank; of sparse that which keeps so many of the weight's values."""
        amount = size / values if self.format is Sparse else size
        return self.format(**{**self.options, self.format.size_option: amount})


def _families(choices: Sequence[Format | Target]) -> Iterator[_Family]:
    seen = set()
    for choice in choices:
        kind = choice.format if isinstance(choice, Target) else type(choice)
        options, defaults, sizes = dict(_options(choice)), kind.option_defaults(), kind.amounts()
        own = {name: value for name, value in options.items() if name not in sizes and value != defaults[name]}
        family = _Family(kind, own)
        if str(family) not in seen:
            seen.add(str(family))
            yield family


def _options(choice: Format | Target) -> Mapping[str, Any]:
    return choice.options if isinstance(choice, Target) else choice.options()


def _of_layer(
    weight: Tensor, layer: Layer, families: Sequence[_Family], statistics: Statistics | None, settings: Settings
) -> Iterator[ErrorCurve]:
    reason = facts_of(weight).flaw
    if reason is not None:
        yield from (ErrorCurve(layer, str(family), reason=reason) for family in families)
        return
    working = working_copy(weight, settings.device)
    try:
        root = _root(layer, statistics, settings.device)
    except NumericalError as error:
        yield from (ErrorCurve(layer, str(family), reason=error.reason) for family in families)
        return
    control = shuffled(working, _SEED)
    for family in families:
        try:
            yield _curve(working, control, root, layer, family, settings.stored_type(layer))
        except (FormatError, NumericalError) as error:
            yield ErrorCurve(layer, str(family), reason=error.reason)


def _root(layer: Layer, statistics: Statistics | None, device: torch.device) -> Tensor | None:
    """Return C with C CT the second moment of the layer's input; None where none is known."""
    found = None if statistics is None else statistics.layers.get(layer.name)
    if found is None or found.counts:
        return None
    require_moment(found.moment, math.prod(layer.shape[1:]))
    return root_of(scaled_to_unit(found.moment.double().to(device))[0])


def _curve(
    weight: Tensor, control: Tensor, root: Tensor | None, layer: Layer, family: _Family, store: torch.dtype
) -> ErrorCurve:
    values = layer.values
    own, shuffle = (bounds_of(each, family.first(), root) for each in (weight, control))

    def setting(size: int) -> Format:
        return family.of_size(size, values)

    most = largest(lambda size: size == 0 or _elements(setting(size), layer) <= values, _full(family, layer))
    if not most:
        raise FormatError(f"no {family.format.name} has fewer elements than the weight")

    def needs(bounds: Bounds, error: float) -> int | None:
        size = 1 + largest(lambda size: size == 0 or bounds(setting(size))[1] > error, most)
        return None if size > most else setting(size).stored_bytes(layer.shape, store)

    points = []
    for size in _spread(most):
        chosen = setting(size)
        (lower, error), (control_lower, control_error) = own(chosen), shuffle(chosen)
        fraction, nbytes = _elements(chosen, layer) / values, chosen.stored_bytes(layer.shape, store)
        points.append(CurvePoint(chosen, fraction, nbytes, error, lower, control_error, control_lower))
    return ErrorCurve(
        layer,
        str(family),
        of_output=root is not None,
        points=tuple(points),
        needed=tuple(Needed(error, needs(own, error), needs(shuffle, error)) for error in ERRORS),
    )


def _spread(most: int) -> list[int]:
    """Return sizes from 1, or from a thousandth, to the largest: each as much larger than the one before."""
    least = max(1.0, most / 1000)
    return sorted({round(least * (most / least) ** (step / (_POINTS - 1))) for step in range(_POINTS)})


def _full(family: _Family, layer: Layer) -> int:
    """Return the size beyond which nothing is gained."""
    first = family.first()
    if isinstance(first, SVD):
        return min(first.sizes(layer.shape))
    if isinstance(first, Folded):
        return max(first.full_ranks(first.folding(layer.shape)), default=1)
    return layer.values


def _elements(setting: Format, layer: Layer) -> int:
    assert layer.dtype.torch is not None, "layers are of floating types"  # noqa: S101
    specs = setting.factor_specs(layer.shape, layer.dtype.torch).values()
    return sum(math.prod(spec.shape) if spec.nonzeros is None else spec.nonzeros for spec in specs)
