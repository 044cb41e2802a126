"""Layers that are fitted as one: which belong together, and whether that is better than each for itself."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import shared_stem
from tcompress.checkpoint.reader import Checkpoint
from tcompress.encodings import FactorSpec, cheapest_bytes
from tcompress.errors import NumericalError, UsageError, printable
from tcompress.formats import Format
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.metric import Metric
from tcompress.workflow.aims import Aim
from tcompress.workflow.fitting import Fitted, fit, fit_group, working_copy
from tcompress.workflow.layout import added_header_bytes, shared_header_bytes
from tcompress.workflow.plan import Rule, Target
from tcompress.workflow.stored import StoredFactor

_ATTEMPTS = 8  # at a tolerance, against the rounding of the stored factors


@dataclass(frozen=True)
class Group:
    """Layers that share factors, what is asked for them, and the name under which the shared factors are stored."""

    name: str
    layers: tuple[Layer, ...]
    choice: Format | Target
    store: torch.dtype | None = None  # that the rules give; None leaves it to the settings of the run

    @property
    def dense_bytes(self) -> int:
        """Bytes of all members as the checkpoint has them."""
        return sum(layer.dense_bytes for layer in self.layers)


@dataclass(frozen=True)
class Shared:
    """A group with its setting found; specs: of the shared factors, and of one member's own."""

    name: str
    setting: GroupFormat
    layers: tuple[Layer, ...]
    specs: Mapping[str, FactorSpec]
    own: Mapping[str, FactorSpec]

    @property
    def stored_bytes(self) -> int:
        """Bytes of all factors."""
        own = sum(map(cheapest_bytes, self.own.values()))
        return sum(map(cheapest_bytes, self.specs.values())) + len(self.layers) * own

    def bytes_of(self, layer: Layer) -> int:
        """Bytes of a member's own factors and its part of the shared ones; those of all members make the whole."""
        shared = sum(map(cheapest_bytes, self.specs.values()))
        part, rest = divmod(shared, len(self.layers))
        own = sum(map(cheapest_bytes, self.own.values()))
        return own + part + (rest if layer == self.layers[0] else 0)

    @property
    def header_bytes(self) -> int:
        """Bytes by which the group lengthens the file's header."""
        own = sum(added_header_bytes(layer, self.setting, self.own, self.name) for layer in self.layers)
        return own + shared_header_bytes(self.name, self.specs)


def is_joint(choice: object) -> bool:
    """Tell whether a rule's choice is a format of several layers at once."""
    kind = choice.format if isinstance(choice, Target) else type(choice)
    return isinstance(kind, type) and issubclass(kind, GroupFormat)


def find_groups(choices: Sequence[tuple[Layer, Format | Target, Rule | None]]) -> list[Group]:
    """Return the groups: those that the rules name, else layers of one shape, type and name but for its numbers.

    Raises UsageError that lists every group that a plan puts together of layers which cannot be.
    """
    found: dict[str, list[tuple[Layer, Format | Target, torch.dtype | None]]] = {}
    for layer, choice, rule in choices:
        named, store = (None, None) if rule is None else (rule.together, rule.store)
        found.setdefault(named or _likeness(layer), []).append((layer, choice, store))
    problems = []
    for name, members in found.items():
        first, *asked = members[0]
        odd = [layer for layer, *_ in members if (layer.shape, layer.dtype) != (first.shape, first.dtype)]
        if odd:
            problems.append(
                f"together {printable(name)}: {printable(odd[0].name)} is {odd[0].dtype.name} {odd[0].shape}, "
                f"{printable(first.name)} is {first.dtype.name} {first.shape}; layers fitted as one have one shape"
            )
        if any(others != asked for _, *others in members):
            problems.append(f"together {printable(name)}: its rules ask for different settings")
    if problems:
        raise UsageError("; ".join(problems))
    return [Group(name, tuple(layer for layer, *_ in members), *members[0][1:]) for name, members in found.items()]


def _likeness(layer: Layer) -> str:
    sizes = "x".join(map(str, layer.shape))
    return f"{re.sub(r'[0-9]+', '#', layer.name)}/{sizes}-{layer.dtype.name}"


def find_shared(
    checkpoint: Checkpoint, group: Group, store: torch.dtype, device: torch.device, *, as_asked: bool = False
) -> Shared | str:
    """Return the group with its setting, or the reason why its members are better off without each other.

    Everything that ``compress`` would do is tried here, so that what a dry run says is what comes. as_asked: whether it
    is no reason that other formats fit the weights better.
    """
    if len(group.layers) < 2:
        return "has nothing to share factors with: no other layer has its shape and, but for numbers, its name"
    taken = [name for name in checkpoint if name.startswith(shared_stem(group.name) + ".")]
    if taken:
        return f"tensor {taken[0]} has a name that the shared factors would take"
    try:
        setting = _setting(checkpoint, group, store, device)
        if isinstance(setting, str):
            return setting
        specs, own = setting.group_specs(group.layers[0].shape, store, len(group.layers))
        shared = Shared(group.name, setting, group.layers, specs, own)
        stored, header = shared.stored_bytes, shared.header_bytes
        if stored + header >= group.dense_bytes:
            return f"larger than dense at {setting}: {stored} + {header} header bytes, dense {group.dense_bytes}"
        return shared if as_asked else _better_apart(checkpoint, shared, store, device) or shared
    except NumericalError as error:
        return error.reason


def fit_shared(
    checkpoint: Checkpoint,
    shared: Shared,
    store: torch.dtype,
    device: torch.device,
    aims: Sequence[Aim | None] = (),
) -> tuple[Mapping[str, StoredFactor], list[Fitted]]:
    """Fit the group; all of its weights are in memory at once, and what is known of their inputs.

    aims: what each member is to become, None for one of whose input nothing is known; without any all errors of the
    weights count alike.
    """
    weights = [checkpoint.read(layer.name) for layer in shared.layers]
    if all(aim is None for aim in aims):
        return fit_group(weights, shared.setting, store=store, device=device)
    targets = [weight if aim is None else aim.target for weight, aim in zip(weights, aims, strict=True)]
    metrics = [_counting_alike(target, aim) for target, aim in zip(targets, aims, strict=True)]
    return fit_group(weights, shared.setting, store=store, device=device, targets=targets, metrics=metrics)


def _counting_alike(target: Tensor, aim: Aim | None) -> Metric:
    """Return the metric in which nothing has an error of one, so that the member with the largest output does not win.

    Of a member of whose input nothing is known it is the relative error of the weight that counts.
    """
    wide = target.double()
    metric = (
        Metric(rows=torch.ones(len(wide), dtype=wide.dtype, device=wide.device))
        if aim is None
        else aim.metric.like(wide)
    )
    whole = metric.square(wide) or 1.0
    return Metric(*(None if each is None else each / whole for each in (metric.gram, metric.rows)))


def _setting(checkpoint: Checkpoint, group: Group, store: torch.dtype, device: torch.device) -> GroupFormat | str:
    choice, shape, count = group.choice, group.layers[0].shape, len(group.layers)
    if isinstance(choice, GroupFormat):
        return choice
    assert isinstance(choice, Target)  # noqa: S101
    kind = choice.format
    assert issubclass(kind, GroupFormat)  # noqa: S101
    if choice.keep is not None:
        budget = math.floor(choice.keep * group.dense_bytes)
        found = kind.within_together(shape, store, budget, count, **choice.options)
        return found or f"no {kind.name} fits {budget} of the group's {group.dense_bytes} bytes"
    assert choice.tolerance is not None  # noqa: S101
    weights, aim = [checkpoint.read(layer.name) for layer in group.layers], choice.tolerance
    copies = [working_copy(weight, device) for weight in weights]
    for _ in range(_ATTEMPTS):
        setting = kind.reaching_together(copies, aim, **choice.options)
        if setting.group_bytes(shape, store, count) >= group.dense_bytes:
            return f"an error of {choice.tolerance:g} needs {setting}, which is larger than dense"
        _, fitted = fit_group(weights, setting, store=store, device=device)
        worst = max(each.relative_error for each in fitted)
        if worst <= choice.tolerance:
            return setting
        square = aim**2 - 1.1 * (worst**2 - choice.tolerance**2)
        if square <= 0:
            break
        aim = math.sqrt(square)
    return f"no {kind.name} stored as {str(store).removeprefix('torch.')} reaches an error of {choice.tolerance:g}"


def _better_apart(checkpoint: Checkpoint, shared: Shared, store: torch.dtype, device: torch.device) -> str | None:
    """Say which format, given the same bytes for each layer alone, has a smaller error; None when none has.

    Errors of several layers are put together as the root of the sum of their squares: each layer counts alike.
    """
    _, fitted = fit_shared(checkpoint, shared, store, device)
    joint = math.hypot(*(each.relative_error for each in fitted))
    for kind in shared.setting.alternatives:
        apart = 0.0
        for layer in shared.layers:
            alone = kind.within(layer.shape, store, shared.stored_bytes // len(shared.layers))
            error = 1.0
            if alone is not None:
                error = fit(checkpoint.read(layer.name), alone, store=store, device=device).relative_error
            apart = math.hypot(apart, error)
        if apart <= joint:
            count = len(shared.layers)
            return (
                f"{count} layers are better apart: at the same bytes {kind.name} has an error of "
                f"{apart / math.sqrt(count):.4f}, {shared.setting} of {joint / math.sqrt(count):.4f}"
            )
    return None
