"""One file or several behind an index: how the pieces of a checkpoint are laid out, and how large each file becomes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tcompress.checkpoint.manifest import SIDECAR, Manifest, compact_json
from tcompress.checkpoint.writer import Piece, file_bytes, in_shards, write_file


@dataclass(frozen=True)
class Layout:
    """Where pieces go.

    stem: of file names inside a folder; None for a file alone. shard_bytes: size of a shard; None for one file.
    indexed: an index is written even when one shard holds everything, because the source had one.
    """

    stem: str | None
    shard_bytes: int | None = None
    indexed: bool = False


@dataclass(frozen=True)
class Contents:
    """What is written: the pieces, the metadata of every file, and the manifest of a compressed checkpoint."""

    pieces: Sequence[Piece]
    metadata: Mapping[str, str]
    manifest: Manifest | None


def planned_bytes(contents: Contents, layout: Layout) -> int:
    """Return the exact bytes of all files that ``write`` makes, before any data is there."""
    shards = list(_shards(contents, layout))
    files = sum(file_bytes(shard.pieces, shard.metadata, shard.manifest) for _, shard in shards)
    return files + sum(len(text) for text in _documents(contents, layout, shards).values())


def write(target: Path, contents: Contents, layout: Layout) -> None:
    """Write the checkpoint: to the file ``target``, or into the folder ``target`` when the layout has a stem."""
    shards = list(_shards(contents, layout))
    for name, shard in shards:
        write_file(target if layout.stem is None else target / name, shard.pieces, shard.metadata, shard.manifest)
    for name, text in _documents(contents, layout, shards).items():
        (target / name).write_text(text, "utf-8")


def _shards(contents: Contents, layout: Layout) -> Iterator[tuple[str, Contents]]:
    parts = [list(contents.pieces)]
    if layout.shard_bytes is not None:
        parts = in_shards(contents.pieces, layout.shard_bytes)
    for number, pieces in enumerate(parts, start=1):
        own = None if contents.manifest is None else contents.manifest.only({piece.group for piece in pieces})
        yield _file_name(layout, number, len(parts)), Contents(pieces, contents.metadata, own)


def _file_name(layout: Layout, number: int, count: int) -> str:
    if count == 1 and not layout.indexed:
        return f"{layout.stem}.safetensors"
    return f"{layout.stem}-{number:05}-of-{count:05}.safetensors"


def _documents(contents: Contents, layout: Layout, shards: Sequence[tuple[str, Contents]]) -> dict[str, str]:
    """Return the index and the whole model's manifest, by file name; a single file needs neither."""
    if layout.stem is None or (len(shards) == 1 and not layout.indexed):
        return {}
    weight_map = {piece.name: name for name, shard in shards for piece in shard.pieces}
    total = sum(piece.nbytes for piece in contents.pieces)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    documents = {f"{layout.stem}.safetensors.index.json": json.dumps(index, indent=2) + "\n"}
    if contents.manifest is not None:
        widest = len(compact_json(contents.manifest.reserved().to_json()))
        documents[SIDECAR] = compact_json(contents.manifest.to_json()).ljust(widest) + "\n"
    return documents
