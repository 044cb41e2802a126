"""What a compressed layer looks like in the file, known before it is fitted: pieces, manifest entry, bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import torch

from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import WIDEST, Entry, Factor, compact_json, shared_stem
from tcompress.checkpoint.writer import Piece
from tcompress.encodings import FactorSpec, cheapest, cheapest_bytes
from tcompress.formats import Format

_PER_DIGEST = 22  # base64 of 16 bytes
_FULLEST_PATTERN = 15 / 16  # of its values, at most: the widest group looked for is one of 16


def entry_of(
    layer: Layer,
    setting: Format,
    factors: Mapping[str, FactorSpec],
    *,
    norm: float = WIDEST,
    relative_error: float | None = WIDEST,
    group: str | None = None,
) -> Entry:
    """Return the layer's manifest entry; without figures it is as long as it can become."""
    return Entry(
        format=setting.name,
        options=setting.pinned(layer.shape).options(),
        kind=layer.kind,
        shape=layer.shape,
        dtype=layer.dtype,
        norm=norm,
        relative_error=relative_error,
        factors=described(factors),
        group=group,
    )


def described(factors: Mapping[str, FactorSpec]) -> dict[str, Factor]:
    """Return how these factors will lie on disk, as a manifest says it."""
    found = {}
    for name, spec in factors.items():
        coding = cheapest(spec)
        found[name] = Factor(coding.name, None if coding.is_plain_tensor else spec.shape, coding.values)
    return found


def pieces_of(stem: str, factors: Mapping[str, FactorSpec], *, together: str | None = None) -> list[Piece]:
    """Return the tensors that will lie on disk for these factors, still without data.

    stem: the layer's name. together: the name of what must lie in the same shard, if not the stem.
    """
    pieces = []
    for factor, spec in factors.items():
        parts = cheapest(spec).parts(spec)
        assert parts is not None, "the cheapest coding can hold the factor"  # noqa: S101
        for part, planned in parts.items():
            name = stored_name(stem, factor, part)
            pieces.append(Piece(name, BY_TORCH[planned.dtype], planned.shape, group=together or stem))
    return pieces


def stored_name(layer: str, factor: str, part: str) -> str:
    """Return the name on disk of a factor's part; the only part of a dense factor has none of its own."""
    return f"{layer}.{factor}.{part}" if part else f"{layer}.{factor}"


def added_header_bytes(
    layer: Layer, setting: Format, factors: Mapping[str, FactorSpec], group: str | None = None
) -> int:
    """Bytes by which compressing the layer lengthens the file's header: on small layers more than it saves."""
    entry = compact_json({layer.name: entry_of(layer, setting, factors, group=group).to_json()})
    before = _header_bytes(Piece(layer.name, layer.dtype, layer.shape, group=layer.name))
    return len(json.dumps(entry)) + _described_bytes(pieces_of(layer.name, factors)) - before - _PER_DIGEST


def shared_header_bytes(group: str, factors: Mapping[str, FactorSpec]) -> int:
    """Bytes by which a group's shared factors lengthen the file's header."""
    entry = compact_json({group: {name: factor.to_json() for name, factor in described(factors).items()}})
    return len(json.dumps(entry)) + _described_bytes(pieces_of(shared_stem(group), factors))


def planned_bytes(layer: Layer, setting: Format, store: torch.dtype, nonzeros: int | None) -> tuple[int, int]:
    """Return the bytes of the layer's factors, and those that its description adds to the header."""
    factors = setting.factor_specs(layer.shape, store, nonzeros)
    stored = setting.stored_bytes(layer.shape, store, nonzeros)
    return stored, added_header_bytes(layer, setting, factors)


def is_exact(spec: FactorSpec, nonzeros: int | None) -> bool:
    """Tell whether the bytes of a planned factor are exact, not a bound that the fitted one may fall below.

    nonzeros: of the weight. Gaps depend on where the values lie; and a weight with zeros may have them in a pattern.
    """
    if spec.nonzeros is None:
        return True
    has_zeros = nonzeros is not None and nonzeros <= _FULLEST_PATTERN * spec.values
    may_gain = has_zeros and spec.pattern is None
    return not may_gain and cheapest_bytes(replace(spec, skips=0)) == cheapest_bytes(spec)


def _described_bytes(pieces: list[Piece]) -> int:
    return sum(_header_bytes(piece) + _PER_DIGEST for piece in pieces)


def _header_bytes(piece: Piece) -> int:
    span = [10**9, 10**9]  # as if in the middle of a large file
    entry = {piece.name: {"dtype": piece.dtype.code, "shape": list(piece.shape), "data_offsets": span}}
    return len(json.dumps(entry, separators=(",", ":"))) - 1
