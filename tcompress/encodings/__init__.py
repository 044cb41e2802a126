"""How one factor lies on disk: its values, where they belong, and what of all that takes the fewest bytes."""

from __future__ import annotations

from tcompress.encodings.base import INT4, Coding, FactorSpec, PartSpec, Support, Values, value_type
from tcompress.encodings.choice import ENCODINGS, VALUES, cheapest, cheapest_bytes, find, measured

__all__ = [
    "ENCODINGS",
    "INT4",
    "VALUES",
    "Coding",
    "FactorSpec",
    "PartSpec",
    "Support",
    "Values",
    "cheapest",
    "cheapest_bytes",
    "find",
    "measured",
    "value_type",
]
