"""A low-rank format inside an option of another format, as the text ``tt:order=3``: its size is the outer format's."""

from __future__ import annotations

from typing import Any

from tcompress.errors import FormatError
from tcompress.formats.base import Format, as_text
from tcompress.formats.cp import CP
from tcompress.formats.options import split
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker

INNER: dict[str, type[Format]] = {kind.name: kind for kind in (SVD, TT, TTMatrix, Tucker, CP)}
SIZES = ("rank", "ranks")


def parse_inner(owner: str, option: str, text: Any) -> tuple[type[Format], dict[str, Any]]:
    """Return format and options that the text names. Raises FormatError for an unknown one, or one with a size."""
    if not isinstance(text, str):
        raise FormatError(f"{owner}: {option} is the name of a format, got {text!r}")
    name, options = split(text)
    if name not in INNER:
        raise FormatError(f"{owner}: {option} is one of {', '.join(INNER)}, got {name!r}")
    if set(options) & set(SIZES):
        raise FormatError(f"{owner}: the rank is {owner}'s own option, not one of {option}")
    return INNER[name], options


def sizes_of(setting: Format) -> dict[str, Any]:
    """Return rank or ranks of a low-rank format, whichever it has."""
    return {name: value for name in SIZES if (value := getattr(setting, name, None)) is not None}


def text_of(setting: Format) -> str:
    """Return the text that names a format with its options, but for its size."""
    options = {name: as_text(value) for name, value in setting.options().items() if name not in SIZES}
    return ":".join([setting.name, *(f"{name}={value}" for name, value in options.items())])
