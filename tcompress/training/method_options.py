"""Options of methods as they were said, checked before a method is made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tcompress.errors import UsageError
from tcompress.training.objective import Method


def names_of(kind: type[Method]) -> tuple[str, ...]:
    """Return the names of a method's options."""
    return tuple(field.name for field in dataclasses.fields(kind))


def made(kind: type[Method], options: Mapping[str, Any], said_as: str) -> Method:
    """Return a method with these options. said_as: what the method was called, for messages.

    Raises UsageError for options that it does not have, and for senseless values.
    """
    require_known(kind, options, said_as)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    for option, value in options.items():
        _require_kind(said_as, option, value, defaults[option])
    return kind(**options)


def require_known(kind: type[Method], options: Mapping[str, Any], said_as: str) -> None:
    """Raise UsageError for an option that a method does not have."""
    foreign = sorted(set(options) - set(names_of(kind)))
    if foreign:
        has = f"it has {', '.join(names_of(kind))}" if names_of(kind) else "it has none"
        raise UsageError(f"--method {said_as}: has no option {foreign[0]}; {has}")


def _require_kind(said_as: str, option: str, value: object, default: object) -> None:
    """Raise UsageError where an option has a default of another kind: a word where there should be a number."""
    kinds: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    if default is not None and (not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)):
        raise UsageError(f"--method {said_as}: {option} is as {default!r}, got {value!r}")
