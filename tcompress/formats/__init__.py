"""Every decomposition there is, and the way from text and JSON to one and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from tcompress.errors import FormatError
from tcompress.formats.base import Factorization, Format
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD

__all__ = ["FORMATS", "Factorization", "Format", "find_format", "from_dict", "make", "parse", "to_dict"]

# The list of all formats: the command line, plans, files, analysis and tests follow from it.
FORMATS: dict[str, type[Format]] = {format_type.name: format_type for format_type in (SVD, Sparse)}


def find_format(name: str) -> type[Format]:
    """Return the format of that name. Raises FormatError that lists those there are."""
    if name not in FORMATS:
        raise FormatError(f"there is no format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def make(format_type: type[Format], options: Mapping[str, Any]) -> Format:
    """Return a format with these options. Raises FormatError for unknown or missing ones, or senseless values."""
    check_options(format_type, options)
    fields = dataclasses.fields(format_type)  # type: ignore[arg-type]  # every subclass is a dataclass
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in options]
    if missing:
        raise FormatError(f"{format_type.name}: needs {', '.join(missing)}, as in {format_type.name}:{missing[0]}=...")
    return format_type(**options)


def check_options(format_type: type[Format], options: Mapping[str, Any]) -> None:
    """Raise FormatError for options that the format does not have."""
    known = [f.name for f in dataclasses.fields(format_type)]  # type: ignore[arg-type]  # as above
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise FormatError(f"{format_type.name}: has no option {', '.join(unknown)}; it has {', '.join(known)}")


def parse(text: str) -> tuple[type[Format], dict[str, Any]]:
    """Split ``svd:rank=16:seed=1`` into the format and its options; lists are written with commas.

    Raises FormatError for unknown formats and options.
    """
    name, *settings = text.split(":")
    format_type, options = find_format(name), {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise FormatError(f"{name}: {setting!r} is no option; write {name}:option=value")
        if "=" in value:
            raise FormatError(f"{name}: {setting!r} has two options in one; separate them as {name}:a=1:b=2")
        options[key] = _value(value)
    check_options(format_type, options)
    return format_type, options


def to_dict(setting: Format) -> dict[str, Any]:
    """Return the format as JSON has it: its name beside the options that are not at their default."""
    return {"format": setting.name, **setting.options()}


def from_dict(document: Mapping[str, Any]) -> Format:
    """Return the format that ``to_dict`` described. Raises FormatError when it describes none."""
    options = dict(document)
    name = options.pop("format", None)
    if not isinstance(name, str):
        raise FormatError("a format needs its name under the key 'format'")
    return make(find_format(name), options)


def _value(text: str) -> Any:
    if "," in text:
        return tuple(_value(part) for part in text.split(",") if part)
    try:
        return json.loads(text)
    except ValueError:
        return text
