"""A plan says which layers get which format: one JSON document that a person edits and a planner writes."""

from __future__ import annotations

import fnmatch
import glob
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tcompress.checkpoint.layers import Layer
from tcompress.errors import FormatError, UsageError, listed
from tcompress.formats import Format, find_format, make, to_dict
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.options import check_options, frozen
from tcompress.formats.svd import SVD
from tcompress.workflow.assumed import SMOOTH
from tcompress.workflow.rank_rules import check_rule
from tcompress.workflow.settings import STORED_TYPES, TYPE_NAMES

VERSION = 1
_BUDGETS = ("keep", "tolerance", "rank_rule")
_COMMENTS = frozenset(
    {"why", "notes", "dense_bytes", "stored_bytes", "expected_error"}
)  # what a written plan tells its reader


@dataclass(frozen=True)
class Target:
    """A format whose size is still to be found for each layer.

    keep: the fraction of the layer's dense bytes that may be kept. tolerance: the largest relative error allowed.
    rank_rule: of ``rank_rules.py``, by which the spectrum says the rank, of svd. Exactly one of them is given.
    """

    format: type[Format]
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: float | None = None
    tolerance: float | None = None
    rank_rule: str | None = None

    def __post_init__(self) -> None:
        name = self.format.name
        if sum(getattr(self, budget) is not None for budget in _BUDGETS) != 1:
            raise FormatError(f"{name}: give one of {self.format.size_option}, keep and tolerance")
        for size in sorted(self.format.amounts()):
            if size in self.options:
                raise FormatError(f"{name}: {size} is given beside keep or tolerance; give one of them")
        _require_fraction(name, "keep", self.keep)
        _require_fraction(name, "tolerance", self.tolerance)
        if self.rank_rule is not None:
            check_rule(self.rank_rule)
            if self.format is not SVD:
                raise FormatError(
                    f"{name}: a rank rule looks at the spectrum of a matrix, which svd has; give its size"
                )
        check_options(self.format, self.options)

    def __str__(self) -> str:
        given = ((budget, getattr(self, budget)) for budget in _BUDGETS)
        (budget,) = (
            f"{name}={value:g}" if name != "rank_rule" else f"{name}={value}"
            for name, value in given
            if value is not None
        )
        return ":".join([self.format.name, *(f"{name}={value}" for name, value in self.options.items()), budget])


@dataclass(frozen=True)
class Rule:
    """Layers whose name matches the glob ``match`` get ``format``; None leaves them dense.

    one_threshold: the amount is that of all these layers together, shared out by one threshold on magnitudes.
    together: layers whose rules give the same text here are fitted as one, by a format of several layers.
    store: the type that factors are stored in; None leaves it to the settings of the run. inputs: what is assumed of
    the layers' inputs, as ``assumed_metric`` has it; None: nothing.
    """

    match: str
    format: Format | Target | None
    one_threshold: bool = False
    comments: Mapping[str, Any] = field(default_factory=dict)
    together: str | None = None
    store: torch.dtype | None = None
    inputs: str | None = None

    def __post_init__(self) -> None:
        format_type: object = self.format.format if isinstance(self.format, Target) else type(self.format)
        if self.together is not None and not (isinstance(format_type, type) and issubclass(format_type, GroupFormat)):
            raise FormatError(f"together: {self.format or 'dense'} fits each layer for itself")
        if self.inputs is not None:
            self._require_known_inputs(format_type)
        if not self.one_threshold:
            return
        if not isinstance(format_type, type) or not issubclass(format_type, Format) or not format_type.has_threshold:
            raise FormatError(f"global: {self.format or 'dense'} prunes nothing, it has no threshold to share")
        if isinstance(self.format, Target) and self.format.tolerance is not None:
            raise FormatError("global: a tolerance is an error per layer; give keep or density")

    def _require_known_inputs(self, format_type: object) -> None:
        if self.inputs != SMOOTH:
            raise FormatError(f"inputs: {self.inputs!r} is nothing to assume of inputs; {SMOOTH} is, or leave it out")
        if isinstance(format_type, type) and issubclass(format_type, GroupFormat):
            raise FormatError(f"inputs: {format_type.name} assumes nothing of inputs; leave it out")
        if isinstance(self.format, Target) and self.format.tolerance is not None:
            raise FormatError("inputs: a tolerance is about the weight, whatever its inputs; give keep or a size")

    def matches(self, name: str) -> bool:
        """Tell whether the rule speaks of the layer."""
        return fnmatch.fnmatchcase(name, self.match)

    def to_json(self) -> dict[str, Any]:
        """Return the rule as it stands in a plan."""
        match self.format:
            case None:
                said: dict[str, Any] = {"format": "dense"}
            case Target() as target:
                budget = {name: value for name in _BUDGETS if (value := getattr(target, name)) is not None}
                said = {"format": target.format.name, **target.options, **budget}
            case setting:
                said = to_dict(setting)
        shared = {"global": True} if self.one_threshold else {}
        together = {"together": self.together} if self.together is not None else {}
        store = {} if self.store is None else {"dtype": TYPE_NAMES[self.store]}
        inputs = {} if self.inputs is None else {"inputs": self.inputs}
        return {"match": self.match, **said, **shared, **together, **store, **inputs, **self.comments}


@dataclass(frozen=True)
class Plan:
    """Rules in order: the first that matches a layer decides; a layer that none matches stays dense."""

    rules: tuple[Rule, ...]

    def rule_for(self, name: str) -> Rule | None:
        """Return the rule that decides about the layer."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def to_json(self) -> dict[str, Any]:
        """Return the document that ``parse_plan`` reads."""
        return {"version": VERSION, "rules": [rule.to_json() for rule in self.rules]}


def exactly(name: str) -> str:
    """Return the glob that matches this name alone."""
    return glob.escape(name)


def plan_for(
    choice: Format | Target,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    one_threshold: bool = False,
    inputs: str | None = None,
) -> Plan:
    """Return the plan that gives one format to all layers, or to those included, but not to those excluded."""
    left_dense = [Rule(pattern, None) for pattern in exclude]
    given = [Rule(pattern, choice, one_threshold, inputs=inputs) for pattern in include or ["*"]]
    return Plan((*left_dense, *given))


def read_plan(path: Path) -> Plan:
    """Read a plan. Raises UsageError that lists every problem in it."""
    try:
        return parse_plan(json.loads(path.read_text("utf-8")), str(path))
    except OSError as error:
        raise UsageError(f"the plan cannot be read ({error.strerror})", path=path) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the plan is not JSON ({error})", path=path) from error


def parse_plan(document: Any, source: str) -> Plan:
    """Turn a JSON document into a plan. Raises UsageError that lists every problem in it; ``source`` names it."""
    match document:
        case {"version": int(version), "rules": [*rules]} if version == VERSION:
            pass
        case {"version": int(version)} if version != VERSION:
            raise UsageError(f"is a plan of version {version}; this tcompress reads version {VERSION}", path=source)
        case _:
            raise UsageError('a plan is {"version": 1, "rules": [{"match": "*", "format": ...}, ...]}', path=source)
    parsed, problems = [], []
    for position, rule in enumerate(rules, start=1):
        try:
            parsed.append(_parse_rule(rule))
        except UsageError as error:
            problems.append(f"rule {position}: {error.reason}")
    if problems:
        raise UsageError("; ".join(problems), path=source)
    return Plan(tuple(parsed))


def check_matches(plan: Plan, layers: Iterable[Layer]) -> None:
    """Raise UsageError for rules that name layers which are not there, and for plans that match nothing at all."""
    names = [layer.name for layer in layers]
    known = listed(names) or "none"
    unmatched = [rule for rule in plan.rules if not any(rule.matches(name) for name in names)]
    missing = [rule.match for rule in unmatched if not glob.has_magic(rule.match)]
    if missing:
        raise UsageError(f"no layer is called {', '.join(missing)}; there are {known}")
    if len(unmatched) == len(plan.rules):
        patterns = ", ".join(rule.match for rule in plan.rules)
        raise UsageError(f"no layer matches {patterns or 'the empty plan'}; there are {known}")


def _parse_rule(rule: Any) -> Rule:
    match rule:
        case {"match": str(match), "format": str(name), **rest}:
            pass
        case _:
            raise UsageError('needs "match" (a glob) and "format" (a name, or "dense")')
    comments = {key: value for key, value in rest.items() if key in _COMMENTS}
    options = {str(key): frozen(value) for key, value in rest.items() if key not in _COMMENTS}
    if name == "dense":
        if options:
            raise UsageError(f"dense takes no {', '.join(options)}")
        return Rule(match, None, comments=comments)
    one_threshold = options.pop("global", False) is True
    store = _stored_type(options.pop("dtype", None))
    together = options.pop("together", None)
    if together is not None and (not isinstance(together, str) or not together):
        raise UsageError(f"together is a name for layers that are fitted as one, got {together!r}")
    inputs = options.pop("inputs", None)
    budget = {key: options.pop(key) for key in _BUDGETS if key in options}
    format_type = find_format(name)
    choice = Target(format_type, options, **budget) if budget else make(format_type, options)
    return Rule(match, choice, one_threshold, comments, together, store, inputs)


def _stored_type(name: Any) -> torch.dtype | None:
    if name is not None and (not isinstance(name, str) or name not in STORED_TYPES):
        raise UsageError(f"dtype is one of {', '.join(STORED_TYPES)}, got {name!r}")
    return None if name is None else STORED_TYPES[name]


def _require_fraction(name: str, option: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise FormatError(f"{name}: {option} must be a fraction from 0 to 1, got {value!r}")
