"""How one factor lies on disk: every encoding, and which of them takes the fewest bytes."""

from __future__ import annotations

from tcompress.encodings.base import Encoding, FactorSpec, PartSpec
from tcompress.encodings.bitmask import Bitmask
from tcompress.encodings.csr import CSR
from tcompress.encodings.dense import Dense

__all__ = ["ENCODINGS", "Encoding", "FactorSpec", "PartSpec", "cheapest", "cheapest_bytes"]

# The list of all encodings. At equal bytes the earlier one is taken.
ENCODINGS: dict[str, Encoding] = {encoding.name: encoding for encoding in (Dense(), Bitmask(), CSR())}


def cheapest(factor: FactorSpec) -> Encoding:
    """Return the encoding with the fewest bytes for a factor; nothing but arithmetic."""
    return min(ENCODINGS.values(), key=lambda encoding: _bytes(encoding, factor))


def cheapest_bytes(factor: FactorSpec) -> int:
    """Return the bytes of the cheapest encoding."""
    return int(_bytes(cheapest(factor), factor))


def _bytes(encoding: Encoding, factor: FactorSpec) -> float:
    nbytes = encoding.nbytes(factor)
    return float("inf") if nbytes is None else nbytes
