"""What a compressed layer looks like in the file, known before it is fitted: pieces, manifest entry, bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import WIDEST, Entry, Factor, compact_json
from tcompress.checkpoint.writer import Piece
from tcompress.encodings import FactorSpec, cheapest
from tcompress.formats import Format

_PER_DIGEST = 22  # base64 of 16 bytes


def entry_of(
    layer: Layer,
    setting: Format,
    factors: Mapping[str, FactorSpec],
    *,
    norm: float = WIDEST,
    relative_error: float = WIDEST,
) -> Entry:
    """Return the layer's manifest entry; without figures it is as long as it can become."""
    encodings = {name: cheapest(spec).name for name, spec in factors.items()}
    return Entry(
        format=setting.name,
        options=setting.options(),
        kind=layer.kind,
        shape=layer.shape,
        dtype=layer.dtype,
        norm=norm,
        relative_error=relative_error,
        factors={
            name: Factor(encodings[name], None if encodings[name] == "dense" else spec.shape)
            for name, spec in factors.items()
        },
    )


def pieces_of(layer: Layer, factors: Mapping[str, FactorSpec]) -> list[Piece]:
    """Return the tensors that will lie on disk for these factors, still without data."""
    pieces = []
    for factor, spec in factors.items():
        parts = cheapest(spec).parts(spec)
        assert parts is not None, "the cheapest encoding can hold the factor"  # noqa: S101
        for part, planned in parts.items():
            name = stored_name(layer.name, factor, part)
            pieces.append(Piece(name, BY_TORCH[planned.dtype], planned.shape, group=layer.name))
    return pieces


def stored_name(layer: str, factor: str, part: str) -> str:
    """Return the name on disk of a factor's part; the only part of a dense factor has none of its own."""
    return f"{layer}.{factor}.{part}" if part else f"{layer}.{factor}"


def added_header_bytes(layer: Layer, setting: Format, factors: Mapping[str, FactorSpec]) -> int:
    """Bytes by which compressing the layer lengthens the file's header: on small layers more than it saves."""
    entry = compact_json({layer.name: entry_of(layer, setting, factors).to_json()})
    pieces = pieces_of(layer, factors)
    before = _header_bytes(Piece(layer.name, layer.dtype, layer.shape, group=layer.name))
    inside = sum(_header_bytes(piece) + _PER_DIGEST for piece in pieces) - before - _PER_DIGEST
    return len(json.dumps(entry)) + inside


def planned_bytes(layer: Layer, setting: Format, store: torch.dtype, nonzeros: int | None) -> tuple[int, int]:
    """Return the bytes of the layer's factors, and those that its description adds to the header."""
    factors = setting.factor_specs(layer.shape, store, nonzeros)
    stored = setting.stored_bytes(layer.shape, store, nonzeros)
    return stored, added_header_bytes(layer, setting, factors)


def _header_bytes(piece: Piece) -> int:
    span = [10**9, 10**9]  # as if in the middle of a large file
    entry = {piece.name: {"dtype": piece.dtype.code, "shape": list(piece.shape), "data_offsets": span}}
    return len(json.dumps(entry, separators=(",", ":"))) - 1
