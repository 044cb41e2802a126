"""From a plan's rules to one decision a layer: this setting, or dense and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError
from tcompress.formats import Format
from tcompress.formats.svd import SVD
from tcompress.linalg.svd import singular_values
from tcompress.workflow.checking import check_plan
from tcompress.workflow.fitting import fit, working_copy
from tcompress.workflow.global_threshold import share_threshold
from tcompress.workflow.grouping import Shared, find_groups, find_shared, is_joint
from tcompress.workflow.layout import planned_bytes
from tcompress.workflow.plan import Plan, Rule, Target, exactly
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.rank_rules import rank_by_rule
from tcompress.workflow.settings import Settings
from tcompress.workflow.survey import Facts, refuse_nonfinite, survey

Search = Callable[[], Format | str]
Recall = Callable[[Layer, Search], Format | str]
_ATTEMPTS = 8  # at a tolerance, against the rounding of the stored factors; two or three do


@dataclass(frozen=True)
class Decision:
    """What becomes of a layer: ``format``, or dense for ``reason``. Bytes are those on disk without the header.

    store: the type that its factors are stored in. notes: what a user should know of the format on this layer.
    shared: the group whose factors it shares. inputs: what is assumed of its inputs, if anything.
    """

    layer: Layer
    format: Format | None
    reason: str | None
    stored_bytes: int
    nonzeros: int | None = None
    notes: tuple[str, ...] = ()
    shared: Shared | None = None
    store: torch.dtype | None = None
    inputs: str | None = None

    def to_rule(self) -> Rule:
        """Return the rule that says this of the layer alone."""
        comments = {"dense_bytes": self.layer.dense_bytes, "stored_bytes": self.stored_bytes}
        why = {} if self.reason is None else {"why": self.reason}
        notes = {"notes": list(self.notes)} if self.notes else {}
        together = None if self.shared is None else self.shared.name
        return Rule(
            exactly(self.layer.name),
            self.format,
            comments={**comments, **why, **notes},
            together=together,
            store=None if self.store == self.layer.dtype.torch else self.store,
            inputs=self.inputs,
        )

    @property
    def stored_type(self) -> torch.dtype:
        """The type that the factors are stored in, of a layer that has some."""
        assert self.store is not None, "only a dense layer stores no factors"  # noqa: S101
        return self.store


def _always_search(layer: Layer, search: Search) -> Format | str:
    del layer
    return search()


def decide(
    checkpoint: Checkpoint,
    layers: Sequence[Layer],
    plan: Plan,
    settings: Settings,
    *,
    progress: Progress = silent,
    recall: Recall = _always_search,
) -> list[Decision]:
    """Return the decision for every layer, in their order.

    recall: given a layer and the search for its setting, returns what the search would find.

    Raises as ``check_plan`` does, and NumericalError for NaN and Inf in layers that the plan wants compressed (unless
    they may stay dense).
    """
    check_plan(checkpoint, layers, plan, settings)
    rules = {layer.name: plan.rule_for(layer.name) for layer in layers}
    wanted = [layer for layer in layers if (rule := rules[layer.name]) is not None and rule.format is not None]
    facts = survey(checkpoint, wanted, progress=progress)
    refuse_nonfinite(checkpoint, facts, settings)
    sound = [layer for layer in wanted if facts[layer.name].flaw is None]
    choices = _choices(checkpoint, sound, rules, settings)
    joint = [(layer, choices[layer.name], rules[layer.name]) for layer in sound if is_joint(choices[layer.name])]
    grouped = decide_groups(checkpoint, joint, settings)
    return [
        grouped.get(layer.name) or _decision(checkpoint, layer, rules[layer.name], choices, facts, settings, recall)
        for layer in steps("planning", layers, progress)
    ]


def decide_groups(
    checkpoint: Checkpoint, choices: Sequence[tuple[Layer, Format | Target | None, Rule | None]], settings: Settings
) -> dict[str, Decision]:
    """Return the decision for every layer that is to be fitted together with others."""
    decided: dict[str, Decision] = {}
    apart = {layer.name: reason for layer, _, _ in choices if (reason := find_clash(checkpoint, layer))}
    for name, reason in apart.items():
        layer = next(layer for layer, _, _ in choices if layer.name == name)
        decided[name] = Decision(layer, None, reason, layer.dense_bytes)
    for group in find_groups([(layer, c, rule) for layer, c, rule in choices if c and layer.name not in apart]):
        store = settings.storing(group.store).stored_type(group.layers[0])
        found = find_shared(checkpoint, group, store, settings.device, as_asked=settings.joint_as_asked)
        for layer in group.layers:
            if isinstance(found, str):
                decided[layer.name] = Decision(layer, None, found, layer.dense_bytes)
            else:
                notes = found.setting.notes(layer.shape)
                decided[layer.name] = Decision(
                    layer, found.setting, None, found.bytes_of(layer), notes=notes, shared=found, store=store
                )
    return decided


def find_clash(checkpoint: Checkpoint, layer: Layer) -> str | None:
    """Return why the factors of a layer cannot be named; None where they can."""
    clash = [name for name in checkpoint if name.startswith(layer.name + ".")]
    return f"tensor {clash[0]} has a name that its factors would take" if clash else None


def resolved(decisions: Sequence[Decision]) -> Plan:
    """Return the plan that repeats these decisions, a rule a layer, for a person to edit."""
    return Plan(tuple(decision.to_rule() for decision in decisions))


def break_even(format_type: type[Format], layer: Layer, store: torch.dtype) -> Format | None:
    """Return the richest setting that still takes fewer bytes than the dense layer; None when there is none."""
    budget = layer.dense_bytes - 1
    for _ in range(3):  # the description of the setting depends on the setting: two rounds settle it
        setting = format_type.within(layer.shape, store, budget)
        if setting is None:
            return None
        stored, header = planned_bytes(layer, setting, store, None)
        if stored + header < layer.dense_bytes:
            return setting
        budget = layer.dense_bytes - header - 1
    return None


def _choices(
    checkpoint: Checkpoint, layers: Sequence[Layer], rules: Mapping[str, Rule | None], settings: Settings
) -> dict[str, Format | Target | None]:
    """Return what the rules say of each layer, shared thresholds already shared out."""
    choices: dict[str, Format | Target | None] = {}
    sharing: dict[int, tuple[Rule, list[Layer]]] = {}
    for layer in layers:
        rule = rules[layer.name]
        assert rule is not None, "only layers that a rule wants compressed come here"  # noqa: S101
        choices[layer.name] = rule.format
        if rule.one_threshold:
            sharing.setdefault(id(rule), (rule, []))[1].append(layer)
    for rule, members in sharing.values():
        stored = {layer.name: settings.storing(rule.store).stored_type(layer) for layer in members}
        choices.update(share_threshold(checkpoint, members, rule, stored, settings.device))
    return choices


def _decision(
    checkpoint: Checkpoint,
    layer: Layer,
    rule: Rule | None,
    choices: Mapping[str, Format | Target | None],
    facts: Mapping[str, Facts],
    settings: Settings,
    recall: Recall,
) -> Decision:
    def dense(reason: str) -> Decision:
        return Decision(layer, None, reason, layer.dense_bytes)

    if rule is None:
        return dense("no rule of the plan matches")
    if rule.format is None:
        return dense(str(rule.comments.get("why", "the plan leaves it dense")))
    flaw = facts[layer.name].flaw
    if flaw is not None:
        return dense(flaw)
    clash = find_clash(checkpoint, layer)
    if clash:
        return dense(clash)
    choice, settings = choices[layer.name], settings.storing(rule.store)

    def search() -> Format | str:
        return find_setting(lambda: checkpoint.read(layer.name), layer, choice, settings)

    try:
        found = recall(layer, search) if isinstance(choice, Target) else search()
    except NumericalError as error:
        return dense(error.reason)
    return replace(weigh(layer, found, facts[layer.name].nonzeros, settings), inputs=rule.inputs)


def weigh(layer: Layer, found: Format | str, nonzeros: int, settings: Settings) -> Decision:
    """Return the decision for a setting, by its bytes and the dense layer's, descriptions included.

    found: why there is none, in its place. nonzeros: of the weight. settings: with the rule's own stored type.
    """
    store = settings.stored_type(layer)
    if isinstance(found, str):
        return Decision(layer, None, found, layer.dense_bytes)
    stored, header = planned_bytes(layer, found, store, nonzeros)
    if stored + header < layer.dense_bytes:
        return Decision(layer, found, None, stored, nonzeros, found.notes(layer.shape), store=store)
    limit = break_even(type(found), layer, store)
    way_out = "no setting is smaller" if limit is None else f"break-even is {limit}"
    reason = f"larger than dense at {found}: {stored} + {header} header bytes, dense {layer.dense_bytes}; {way_out}"
    return Decision(layer, None, reason, layer.dense_bytes)


def find_setting(
    read: Callable[[], Tensor], layer: Layer, choice: Format | Target | None, settings: Settings
) -> Format | str:
    """Return the setting that a choice means for a layer, or the reason why there is none.

    read: gives the weight, where its values decide. Raises NumericalError when the computation breaks down.
    """
    match choice:
        case Target(keep=float() | int() as keep):
            budget = math.floor(keep * layer.dense_bytes)
            store = settings.stored_type(layer)
            if choice.format.adapts:
                weight = working_copy(read(), settings.device)
                setting = choice.format.best_within(weight, store, budget, **choice.options)
            else:
                setting = choice.format.within(layer.shape, store, budget, **choice.options)
            return setting or _too_small(choice, layer, settings.stored_type(layer), budget)
        case Target(rank_rule=str() as rule):
            return _by_rule(working_copy(read(), settings.device), choice, rule)
        case Target():
            return _reaching(read(), layer, choice, settings)
        case Format():
            return choice
    return "the plan leaves it dense"


def _by_rule(weight: Tensor, target: Target, rule: str) -> Format:
    first = target.format(**{**target.options, "rank": 1})
    assert isinstance(first, SVD), "only svd takes a rule"  # noqa: S101
    rows, columns = first.sizes(tuple(weight.shape))
    return replace(first, rank=rank_by_rule(rule, singular_values(first.matrix(weight)), rows, columns))


def _too_small(target: Target, layer: Layer, store: torch.dtype, budget: int) -> str:
    """Say that nothing fits a budget, and what would be the smallest that fits one."""
    problem = f"no {target.format.name} fits {budget} of {layer.dense_bytes} bytes"
    low, high = budget, 2 * layer.dense_bytes
    if target.format.within(layer.shape, store, high, **target.options) is None:
        return problem
    while high - low > 1:
        middle = (low + high) // 2
        fits = target.format.within(layer.shape, store, middle, **target.options) is not None
        low, high = (low, middle) if fits else (middle, high)
    return f"{problem}; the smallest takes {high}"


def _reaching(weight: Tensor, layer: Layer, target: Target, settings: Settings) -> Format | str:
    """Return the smallest setting whose STORED error is within the tolerance.

    Rounding adds to the error of exact arithmetic, so the aim is tightened by what it added until the sum fits.
    """
    assert target.tolerance is not None  # noqa: S101
    store, aim = settings.stored_type(layer), target.tolerance
    for _ in range(_ATTEMPTS):
        setting = target.format.reaching(working_copy(weight, settings.device), aim, **target.options)
        if setting.stored_bytes(layer.shape, store) >= layer.dense_bytes:
            return f"an error of {target.tolerance:g} needs {setting}, which is larger than dense"
        error = fit(weight, setting, store=store, device=settings.device).relative_error
        if error <= target.tolerance:
            return setting
        square = aim**2 - 1.1 * (error**2 - target.tolerance**2)
        if square <= 0:
            break
        aim = math.sqrt(square)
    kept_as = str(store).removeprefix("torch.")
    return f"no {target.format.name} stored as {kept_as} reaches an error of {target.tolerance:g}"
