"""What a plan may cost: one budget, what of a candidate counts against it, and how much of that there is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from tcompress.errors import LimitError, UsageError
from tcompress.workflow.allocation import Point
from tcompress.workflow.choices import Choices
from tcompress.workflow.multiplications import multiplications

ONE_BUDGET = "give one budget: --keep, --max-bytes, --max-error, --flops or, with --task, --max-drop"
_FRACTIONS = ("keep", "flops")


@dataclass(frozen=True)
class Budget:
    """Exactly one of them is given.

    keep: fraction of the layers' dense bytes that their factors may take. max_bytes: of the whole file. flops: fraction
    of the layers' dense multiplications. max_error: largest relative error of any layer, at the fewest bytes.
    """

    keep: float | None = None
    max_bytes: int | None = None
    max_error: float | None = None
    flops: float | None = None

    def __post_init__(self) -> None:
        if len(self.given()) != 1:
            raise UsageError(ONE_BUDGET)
        for name, value in self.given().items():
            most = 1 if name in _FRACTIONS else math.inf
            if not (0 <= value <= most and math.isfinite(value)):
                option, kind = name.replace("_", "-"), "a fraction from 0 to 1" if most == 1 else "a number from 0 on"
                raise UsageError(f"--{option} is {kind}, got {value}")

    def given(self) -> dict[str, float]:
        """Return the budget by its name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def points_of(choices: Choices, budget: Budget) -> list[list[Point]]:
    """Return what each candidate of each layer counts against the budget, and what it loses."""
    known, found = choices.known, []
    for layer, curve in zip(choices.layers, choices.curves, strict=True):
        weight = known.importance_of(layer)
        if budget.flops is not None:
            calls = known.calls_of(layer)
            costs = [multiplications(layer, each.format, calls) for each in curve]
        else:
            whole = budget.max_bytes is not None
            costs = [each.stored_bytes + (each.header_bytes if whole else 0) for each in curve]
        found.append([Point(cost, weight * each.loss) for cost, each in zip(costs, curve, strict=True)])
    return found


def limit_of(choices: Choices, budget: Budget) -> int:
    """Return how much a plan may cost altogether, in the unit of ``points_of``; or how many bytes a file may have."""
    if budget.flops is not None:
        return math.floor(budget.flops * dense_multiplications(choices))
    if budget.keep is not None:
        return math.floor(budget.keep * choices.dense_bytes)
    assert budget.max_bytes is not None, "an error is no cost"  # noqa: S101
    return budget.max_bytes


def dense_multiplications(choices: Choices) -> int:
    """Return what all layers multiply as they are."""
    return sum(multiplications(layer, None, choices.known.calls_of(layer)) for layer in choices.layers)


def unmet(choices: Choices, budget: Budget, limit: int, least: int) -> LimitError:
    """Return the error of a budget that no plan keeps, with the smallest that one does.

    limit, least: how much a plan may cost, and the cheapest does; of ``max_bytes`` the bytes of the file.
    """
    if budget.max_bytes is not None:
        unit, way_out = "bytes of the whole file", f"--max-bytes {least}"
    elif budget.keep is not None:
        unit, way_out = "bytes of factors", f"--keep {_fraction(least, choices.dense_bytes)}"
    else:
        unit, way_out = "multiplications", f"--flops {_fraction(least, dense_multiplications(choices))}"
    problem = f"no plan keeps within {limit} {unit}; the smallest takes {least}, {way_out}"
    return LimitError(problem, path=choices.checkpoint.path)


def _fraction(part: int, whole: int) -> str:
    """Return the smallest fraction that allows ``part`` of ``whole``, with as few digits as tell it within 0.1 %."""
    if part == 0:
        return "0"
    for digits in range(3 - math.floor(math.log10(part / whole)), 18):
        text = f"{math.ceil(part / whole * 10**digits) / 10**digits:.{digits}f}".rstrip("0").rstrip(".")
        if math.floor(float(text) * whole) >= part:
            return text
    return "1"
