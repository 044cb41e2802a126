"""A compressed checkpoint with some of its layers compressed further, everything else as it lies in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from tcompress.checkpoint import shards
from tcompress.checkpoint.companions import copy_companions
from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.integrity import require_whole
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import METADATA_KEY, Manifest
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.shards import Contents
from tcompress.checkpoint.writer import Piece
from tcompress.workflow.compression import layout_of
from tcompress.workflow.decoding import view
from tcompress.workflow.fitting import Fitted
from tcompress.workflow.layout import entry_of, stored_name
from tcompress.workflow.resaving import copies_of, in_order


def recompress(checkpoint: Checkpoint, found: Mapping[Layer, Fitted], *, out: Path) -> None:
    """Write a compressed checkpoint again, with new factors of some layers, dense ones among them.

    The manifest says of the others, and of the source, what it said before. A file becomes a file, a folder a folder.

    Raises InputError when a byte of ``checkpoint`` is not as it was written, and OutputError when ``out`` cannot be.
    """
    dense = view(checkpoint)
    require_whole(checkpoint)
    names = {layer.name for layer in found}
    pieces = [piece for layer, each in found.items() for piece in _pieces(layer.name, each)]
    pieces += copies_of(dense, [name for name in dense.infos if name not in names])
    metadata = {key: value for key, value in checkpoint.metadata.items() if key != METADATA_KEY}
    contents = Contents(in_order(pieces, dense), metadata, _manifest(dense.manifest, found))
    layout = layout_of(checkpoint, None)
    inputs = [*checkpoint.files, *filter(None, [checkpoint.folder])]
    with Output(out, is_folder=checkpoint.folder is not None, force=False, inputs=inputs) as output:
        output.require_space(shards.planned_bytes(contents, layout))
        shards.write(output.draft, contents, layout)
        if checkpoint.folder is not None:
            copy_companions(checkpoint.folder, output.draft, without=(out, *checkpoint.files))
        output.commit()


def _manifest(was: Manifest, found: Mapping[Layer, Fitted]) -> Manifest:
    entries = {
        layer.name: entry_of(layer, each.format, each.specs(), norm=each.norm, relative_error=each.relative_error)
        for layer, each in found.items()
    }
    formulas = {each.format.name: each.format.rebuild for each in found.values()}
    layers = {**was.layers, **entries}
    repaired = tuple(name for name in was.repaired if name not in layers)
    return replace(was, rebuild={**was.rebuild, **formulas}, layers=layers, repaired=repaired)


def _pieces(stem: str, found: Fitted) -> list[Piece]:
    return [
        _piece(stored_name(stem, factor, part), tensor, stem)
        for factor, stored in found.stored.items()
        for part, tensor in stored.parts.items()
    ]


def _piece(name: str, tensor: Tensor, group: str) -> Piece:
    return Piece(name, BY_TORCH[tensor.dtype], tuple(tensor.shape), group, partial(bytes_of, tensor))
