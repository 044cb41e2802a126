"""What can be said against a plan before any weight is looked at: all of it at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.memory import require_memory
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import FormatError, UsageError, listed, printable
from tcompress.formats import Format
from tcompress.workflow.plan import Plan, Target, check_matches
from tcompress.workflow.settings import Settings

_NAMES_SHOWN = 3  # of layers with one problem
_WORKING_COPIES = 4  # of a layer in memory while it is fitted, at most


def check_plan(checkpoint: Checkpoint, layers: Sequence[Layer], plan: Plan, settings: Settings) -> None:
    """Raise what ``decide`` would raise of a plan without looking at any weight; it lists every such layer.

    Raises UsageError when the plan speaks of layers that are not there, or asks for what their shapes do not allow,
    SafetyError for a layer that is too large for this machine's memory or the user's limit.
    """
    try:
        check_matches(plan, layers)
    except UsageError as error:
        raise UsageError(error.reason, path=checkpoint.path) from error
    chosen = [(layer, rule.format) for layer in layers if (rule := plan.rule_for(layer.name)) is not None]
    wanted = [(layer, choice) for layer, choice in chosen if choice is not None]
    check_choices(wanted, settings)
    require_working_memory(checkpoint, [layer for layer, _ in wanted])


def check_choices(choices: Sequence[tuple[Layer, Format | Target | None]], settings: Settings) -> None:
    """Raise UsageError that lists every problem of shapes that do not allow what is asked, and whose they are."""
    problems: dict[str, list[str]] = {}
    for layer, choice in choices:
        try:
            match choice:
                case Target():
                    choice.format.within(layer.shape, settings.stored_type(layer), layer.dense_bytes, **choice.options)
                case Format():
                    choice.factor_specs(layer.shape, settings.stored_type(layer))
        except FormatError as error:
            problems.setdefault(error.reason, []).append(printable(layer.name))
    if problems:
        raise UsageError("; ".join(f"{listed(names, _NAMES_SHOWN)}: {reason}" for reason, names in problems.items()))


def require_working_memory(checkpoint: Checkpoint, layers: Sequence[Layer]) -> None:
    """Raise SafetyError for a layer that cannot be fitted within the memory there is, before anything is read."""
    for layer in layers:
        precision = torch.float64 if layer.dtype.torch == torch.float64 else torch.float32
        require_memory(layer.shape, precision, path=checkpoint.path, tensor=layer.name, copies=_WORKING_COPIES)
