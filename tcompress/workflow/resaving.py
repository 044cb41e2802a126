"""A model back into the likeness of the compressed checkpoint that it was loaded from: names, types, layout, files.

What training leaves is written where it was read: factors in the types that they had, dense tensors too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from tcompress.checkpoint import shards
from tcompress.checkpoint.companions import copy_companions
from tcompress.checkpoint.manifest import METADATA_KEY, Manifest, shared_stem
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.shards import Contents
from tcompress.checkpoint.writer import Piece
from tcompress.errors import UsageError
from tcompress.runtime.modules import Factorized
from tcompress.workflow.compression import layout_of
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.matching import Place, places_in, without_prefix
from tcompress.workflow.saving import contents_of


def kept_dense(model: nn.Module, like: Checkpoint, *, strip_prefix: str = "") -> list[str]:
    """Return the model's tensors that are factors in the file and dense in the model: as such they cannot be saved."""
    dense, places = view(like), places_in(model)
    names = without_prefix(dense.infos, strip_prefix, like.path)
    firsts = {name: dense.manifest.tied.get(stored, stored) for name, stored in names.items()}
    found = [places[name].identity for name in names if _is_kept(places[name], firsts[name], dense)]
    return [name for name, place in places.items() if place.identity in found]


def write_like(
    output: Output, model: nn.Module, like: Checkpoint, *, strip_prefix: str = "", against: Checkpoint | None = None
) -> None:
    """Write a model's draft, laid out as the compressed checkpoint ``like`` that it was loaded from.

    Layers that ``load_into`` could only load dense, and tensors that are no floating numbers, are copied as they are
    stored. Dense tensors with other values than in the file are named as repaired. against: as in ``save_compressed``.

    Raises as that does, and UsageError where some layers of a group that shares factors are dense in the model.
    """
    dense, places = view(like), places_in(model)
    names = without_prefix(dense.infos, strip_prefix, like.path)
    once: dict[int, Place] = {}  # tensors that the model shares stay one
    changing = {
        stored: once.setdefault(places[name].identity, _as_stored(places[name], dense, stored))
        for name, stored in names.items()
        if not _is_kept(places[name], dense.manifest.tied.get(stored, stored), dense)
        and (isinstance(places[name].held, Factorized) or dense.infos[stored].dtype.is_floating)
    }
    found = contents_of(changing, against)
    assert found.manifest is not None, "it is compressed"  # noqa: S101
    untouched = [name for name in dense.infos if name not in changing]
    manifest = _manifest(found.manifest, dense, untouched, _other_values(found, like))
    metadata = {key: value for key, value in like.metadata.items() if key != METADATA_KEY}
    pieces = in_order([*found.pieces, *copies_of(dense, untouched)], dense)
    contents, layout = Contents(pieces, metadata, manifest), layout_of(like, None)
    output.require_space(shards.planned_bytes(contents, layout))
    shards.write(output.draft, contents, layout)
    if like.folder is not None:
        copy_companions(like.folder, output.draft, without=(output.path, *like.files))


def _is_kept(place: Place, first: str, dense: CompressedView) -> bool:
    return first in dense.manifest.layers and isinstance(place.held, Tensor)


def _as_stored(place: Place, dense: CompressedView, stored: str) -> Place:
    """Return a place with its tensor in the type that the file has."""
    dtype = dense.infos[stored].dtype.torch
    if isinstance(place.held, Factorized) or dtype is None:
        return place
    return replace(place, held=place.held.detach().to(dtype))


def _other_values(found: Contents, like: Checkpoint) -> set[str]:
    """Return the dense tensors whose bytes are not those of the file."""
    return {
        piece.name
        for piece in found.pieces
        if piece.name == piece.group and piece.data is not None and piece.name in like
        if piece.data() != like.raw(piece.name)
    }


def _manifest(found: Manifest, dense: CompressedView, untouched: Sequence[str], repaired: set[str]) -> Manifest:
    """Return the manifest of what was found, with what the file says of all that was not touched."""
    was = dense.manifest
    entries = {name: was.layers[name] for name in untouched if name in was.layers}
    groups = {entry.group for entry in entries.values() if entry.group is not None}
    split = sorted(groups & set(found.shared))
    if split:
        problem = f"its group {split[0]} shares factors, and some of its layers are dense in the model"
        raise UsageError(problem, path=dense.checkpoint.path)
    formulas = {entry.format: was.rebuild[entry.format] for entry in entries.values()}
    return replace(
        found,
        source=was.source,
        tied={**found.tied, **{name: was.tied[name] for name in untouched if name in was.tied}},
        rebuild={**found.rebuild, **formulas},
        layers={**found.layers, **entries},
        shared={**found.shared, **{group: was.shared[group] for group in groups}},
        repaired=tuple(sorted(repaired.union(was.repaired))),
    )


def copies_of(dense: CompressedView, untouched: Sequence[str]) -> Iterator[Piece]:
    """Yield the pieces of tensors that stay as they lie in the file; what a group shares once."""
    shared: set[str] = set()
    for name in untouched:
        if name in dense.manifest.tied:
            continue
        entry = dense.manifest.layers.get(name)
        stem = name if entry is None or entry.group is None else shared_stem(entry.group)
        parts = [name] if entry is None else list(dense.stored[name])
        if entry is not None and entry.group is not None and entry.group not in shared:
            shared.add(entry.group)
            parts = [*dense.shared[entry.group], *parts]
        for part in parts:
            info = dense.checkpoint[part]
            yield Piece(part, info.dtype, info.shape, stem, partial(dense.checkpoint.raw, part))


def in_order(pieces: Sequence[Piece], dense: CompressedView) -> list[Piece]:
    """Return the pieces in the order of the file's tensors; those of a group stay together."""
    rank = {name: at for at, name in enumerate(dense.infos)}
    for group in dense.manifest.shared:
        rank[shared_stem(group)] = min(rank[name] for name in dense.manifest.members(group))
    return sorted(pieces, key=lambda piece: rank.get(piece.group, len(rank)))
