"""Writes safetensors files piece by piece: one tensor in memory at a time, the same header each time.

safetensors' own writer wants all tensors at once, orders metadata at random and does not fsync; the layout is simple
enough (8 bytes of length, a JSON header, the data) to write it here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128

from tcompress.checkpoint.dtypes import DType
from tcompress.checkpoint.integrity import BLANK, DIGEST_BYTES, header_digest, pack_digests
from tcompress.checkpoint.manifest import METADATA_KEY, Manifest, compact_json
from tcompress.checkpoint.safetensors_file import MAX_HEADER_BYTES
from tcompress.errors import OutputError

_CHUNK = 8 << 20


@dataclass(frozen=True)
class Piece:
    """One tensor to be written; ``data`` is asked for its bytes when its turn comes, and may be None before that.

    group: pieces of one group lie in one shard.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    group: str
    data: Callable[[], memoryview] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return (math.prod(self.shape) * self.dtype.bits + 7) // 8


def in_shards(pieces: Sequence[Piece], max_shard_bytes: int) -> list[list[Piece]]:
    """Fill shards one after the other, in the given order; a group larger than a shard has one for itself."""
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.group, []).append(piece)
    shards: list[list[Piece]] = []
    room = -1
    for group in groups.values():
        size = sum(piece.nbytes for piece in group)
        if size > room or not shards:
            shards.append([])
            room = max_shard_bytes
        shards[-1].extend(group)
        room -= size
    return shards


def in_file_order(pieces: Iterable[Piece]) -> list[Piece]:
    """Widest element types first: every tensor then starts at a multiple of its element's size."""
    return sorted(pieces, key=lambda piece: -piece.dtype.bits)


def file_bytes(pieces: Sequence[Piece], metadata: Mapping[str, str], manifest: Manifest | None) -> int:
    """Return the exact size of the file that ``write_file`` makes, before any data is there."""
    return len(_reserved_header(in_file_order(pieces), metadata, manifest)) + sum(piece.nbytes for piece in pieces)


def write_file(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str], manifest: Manifest | None) -> None:
    """Write one safetensors file and fsync it.

    The data goes first and the header last, because the header holds the hashes of the data. Raises OutputError when
    the header would be too large for safetensors, or cannot hold the names.
    """
    ordered = in_file_order(pieces)
    _require_names(ordered)
    reserved = _reserved_header(ordered, metadata, manifest)
    if len(reserved) - 8 > MAX_HEADER_BYTES:
        raise OutputError(f"needs a header of {len(reserved)} bytes, more than safetensors allows", path=path)
    digests = []
    with path.open("wb") as file:
        file.seek(len(reserved))
        for piece in ordered:
            digests.append(_write_piece(file, piece))
        file.seek(0)
        header = _sealed_header(ordered, metadata, manifest, digests, len(reserved))
        assert len(header) == len(reserved), "the header must not reach into the data"  # noqa: S101
        file.write(header)
        file.flush()
        os.fsync(file.fileno())


def _require_names(ordered: Sequence[Piece]) -> None:
    seen = {"__metadata__"}
    for piece in ordered:
        if piece.name in seen:
            raise OutputError("is a name that the file has already", tensor=piece.name)
        seen.add(piece.name)


def _write_piece(file: BinaryIO, piece: Piece) -> bytes:
    assert piece.data is not None, f"{piece.name} has no data yet"  # noqa: S101
    content, hasher = piece.data(), xxh3_128()
    if len(content) != piece.nbytes:
        raise OutputError(f"has {len(content)} bytes where {piece.nbytes} were announced", tensor=piece.name)
    for start in range(0, len(content), _CHUNK):
        chunk = content[start : start + _CHUNK]
        hasher.update(chunk)
        file.write(chunk)
    return hasher.digest()


def _reserved_header(ordered: Sequence[Piece], metadata: Mapping[str, str], manifest: Manifest | None) -> bytes:
    widest = None if manifest is None else manifest.reserved()
    return _header(ordered, _with_manifest(metadata, widest, [bytes(DIGEST_BYTES)] * len(ordered), BLANK), 0)


def _sealed_header(
    ordered: Sequence[Piece],
    metadata: Mapping[str, str],
    manifest: Manifest | None,
    digests: Sequence[bytes],
    length: int,
) -> bytes:
    blank = _header(ordered, _with_manifest(metadata, manifest, digests, BLANK), length)
    if manifest is None:
        return blank
    return _header(ordered, _with_manifest(metadata, manifest, digests, header_digest(blank)), length)


def _with_manifest(
    metadata: Mapping[str, str], manifest: Manifest | None, digests: Sequence[bytes], seal: str
) -> Mapping[str, str]:
    if manifest is None:
        return metadata
    hashes = {"tensors": pack_digests(digests), "header": seal}
    return {**metadata, METADATA_KEY: compact_json({**manifest.to_json(), "hashes": hashes})}


def _header(ordered: Sequence[Piece], metadata: Mapping[str, str], length: int) -> bytes:
    """Return length field and header, padded with spaces to a multiple of 8 and to at least ``length``."""
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for piece in ordered:
        span = [end, end := end + piece.nbytes]
        entries[piece.name] = {"dtype": piece.dtype.code, "shape": list(piece.shape), "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    size = max(math.ceil(len(text) / 8) * 8, length - 8)
    return size.to_bytes(8, "little") + text.ljust(size)
