"""A format's options as text, as JSON and as checked values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tcompress.errors import FormatError
from tcompress.formats.base import Format


def make(format_type: type[Format], options: Mapping[str, Any]) -> Format:
    """Return a format with these options. Raises FormatError for unknown or missing ones, or senseless values."""
    check_options(format_type, options)
    fields = dataclasses.fields(format_type)  # type: ignore[arg-type]  # every subclass is a dataclass
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in options]
    if missing:
        raise FormatError(f"{format_type.name}: needs {', '.join(missing)}, as in {format_type.name}:{missing[0]}=...")
    try:
        return format_type(**{name: frozen(value) for name, value in options.items()})
    except RecursionError as error:
        raise FormatError(f"{format_type.name}: an option is nested without end") from error


def check_options(format_type: type[Format], options: Mapping[str, Any]) -> None:
    """Raise FormatError for options that the format does not have."""
    known = [f.name for f in dataclasses.fields(format_type)]  # type: ignore[arg-type]  # as above
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise FormatError(f"{format_type.name}: has no option {', '.join(unknown)}; it has {', '.join(known)}")


def frozen(value: Any) -> Any:
    """Return JSON's lists as tuples, all the way down: what a frozen dataclass can hold."""
    return tuple(frozen(item) for item in value) if isinstance(value, list) else value


def split(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``svd:rank=16:seed=1`` into name and options; lists are written with commas.

    An option ``inner.order=3`` belongs to the format that the option ``inner`` names: together they are the text
    ``tt:order=3``. Raises FormatError for text that is no option.
    """
    name, *settings = text.split(":")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise FormatError(f"{name}: {setting!r} is no option; write {name}:option=value")
        if "=" in value:
            raise FormatError(f"{name}: {setting!r} has two options in one; separate them as {name}:a=1:b=2")
        owner, dot, own = key.partition(".")
        if not dot:
            options[key] = _value(value)
        elif owner in options:
            options[owner] = f"{options[owner]}:{own}={value}"
        else:
            raise FormatError(f"{name}: {setting!r} says something of {owner}, which must be given before it")
    return name, options


def _value(text: str) -> Any:
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
