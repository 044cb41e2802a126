"""Ranks that hardware likes: matrix units work on tiles, and a rank that fills them costs no more than one below it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tcompress.errors import UsageError
from tcompress.formats import Format


def check_multiple(multiple: int) -> None:
    """Raise UsageError unless ranks can be multiples of it."""
    if type(multiple) is not int or multiple < 1:
        raise UsageError(f"--rank-multiple is a whole number of at least 1, got {multiple!r}")


def rounded(setting: Format, multiple: int) -> Format:
    """Return the setting with each of its ranks rounded down to a multiple, and the multiple itself for smaller ones.

    A rank is still clipped to what the sizes of the weight allow. Formats without ranks stay what they are, and so does
    a part that is left out by rank 0.
    """
    if multiple == 1:
        return setting
    rank, ranks = getattr(setting, "rank", None), getattr(setting, "ranks", None)
    changes: dict[str, Any] = {}
    if rank:
        changes["rank"] = _rounded(rank, multiple)
    if ranks:
        changes["ranks"] = tuple(_rounded(each, multiple) for each in ranks)
    return replace(setting, **changes) if changes else setting  # type: ignore[type-var]  # every format is a dataclass


def _rounded(rank: int, multiple: int) -> int:
    return max(rank // multiple, 1) * multiple if rank else 0
