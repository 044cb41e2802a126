"""Figures as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def as_bytes(nbytes: int | None) -> str:
    """Return 1234567 as ``1.23 MB``: decimal units, three digits."""
    if nbytes is None:
        return ""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 99.95 or units[0] == "B" else f"{size:.3g} {units[0]}"


def as_error(error: float | None) -> str:
    """Return a relative error with four decimals; one too small for them in scientific notation."""
    if error is None:
        return ""
    return f"{error:.4f}" if error == 0 or error >= 1e-3 else f"{error:.1e}"


def as_shape(shape: Sequence[int]) -> str:
    """Return (64, 3, 3, 3) as ``64x3x3x3``; a single value has shape ``()``."""
    return "x".join(map(str, shape)) or "()"


def as_seconds(seconds: float) -> str:
    """Return a duration with the unit that fits it."""
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
