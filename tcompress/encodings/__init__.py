"""How one factor lies on disk: its values, where they belong, and what of all that takes the fewest bytes."""

from __future__ import annotations

from tcompress.encodings.base import (
    CODED,
    INT3,
    INT4,
    Coding,
    FactorSpec,
    Levels,
    PartSpec,
    Support,
    Values,
    value_type,
)
from tcompress.encodings.choice import ENCODINGS, VALUES, cheapest, cheapest_bytes, find, measured

__all__ = [
    "CODED",
    "ENCODINGS",
    "INT3",
    "INT4",
    "VALUES",
    "Coding",
    "FactorSpec",
    "Levels",
    "PartSpec",
    "Support",
    "Values",
    "cheapest",
    "cheapest_bytes",
    "find",
    "measured",
    "value_type",
]
