"""The table of all methods: one line each."""

from __future__ import annotations

import dataclasses
from typing import Any

from tcompress.errors import FormatError, UsageError
from tcompress.formats.options import split
from tcompress.training.distillation import Distill
from tcompress.training.finetuning import Finetune
from tcompress.training.iterating import Iterate
from tcompress.training.learning_compression import LearningCompression
from tcompress.training.objective import Method
from tcompress.training.pruning import Prune
from tcompress.training.reconstruction import Reconstruct
from tcompress.training.scratch import FromScratch

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Finetune, Distill, Reconstruct, Prune, LearningCompression, Iterate, FromScratch)
}


def make_method(text: str, **options: Any) -> Method:
    """Return the method that ``distill:alpha=0.5:temperature=2`` names, with those of ``options`` that are not None.

    Raises UsageError for a method that there is not, for options that it does not have, and for senseless values.
    """
    try:
        name, said = split(text)
    except FormatError as error:
        raise UsageError(f"--method {error.reason}") from error
    if name not in METHODS:
        raise UsageError(f"--method: {name!r} is none of {', '.join(METHODS)}")
    fields = {field.name: field for field in dataclasses.fields(METHODS[name])}
    foreign = sorted(set(said) - set(fields))
    if foreign:
        has = f"it has {', '.join(fields)}" if fields else "it has none"
        raise UsageError(f"--method {name}: has no option {foreign[0]}; {has}")
    given = {option: value for option, value in options.items() if value is not None}
    foreign = sorted(set(given) - set(fields))
    if foreign:
        raise UsageError(f"--method {name} has no --{foreign[0].replace('_', '-')}")
    twice = sorted(set(said) & set(given))
    if twice:
        raise UsageError(f"--method {name} says its {twice[0]} already; leave out --{twice[0].replace('_', '-')}")
    for option, value in said.items():
        _require_kind(name, option, value, fields[option].default)
    return METHODS[name](**said, **given)


def _require_kind(name: str, option: str, value: object, default: object) -> None:
    """Raise UsageError where an option has a default of another kind: a word where there should be a number."""
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
        raise UsageError(f"--method {name}: {option} is as {default!r}, got {value!r}")
