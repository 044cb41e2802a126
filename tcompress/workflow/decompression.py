"""decompress(): a compressed checkpoint in, the plain one that it stands for out."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import torch

from tcompress.checkpoint import shards
from tcompress.checkpoint.companions import copy_companions
from tcompress.checkpoint.integrity import require_whole
from tcompress.checkpoint.manifest import METADATA_KEY
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.memory import require_memory
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX, TORCH_SUFFIXES
from tcompress.checkpoint.output import STAGED, Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.safetensors_file import SafetensorsFile
from tcompress.checkpoint.shards import Contents, Layout
from tcompress.checkpoint.torch_writer import write_torch
from tcompress.checkpoint.unchanged import Witness
from tcompress.checkpoint.writer import Piece
from tcompress.errors import UsageError
from tcompress.workflow.compression import refuse_shards
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.hugging_face import withdraw
from tcompress.workflow.progress import Progress, Step, silent
from tcompress.workflow.results import DecompressionResult, describe, measure

STEM = "model"


def decompress(
    checkpoint: Checkpoint,
    *,
    out: Path | str,
    device: torch.device | None = None,
    force: bool = False,
    max_shard_bytes: int | None = None,
    progress: Progress = silent,
) -> DecompressionResult:
    """Write the dense checkpoint to ``out`` with the original names, shapes, types and layout.

    A file's suffix says whether it becomes safetensors or a torch checkpoint; in a torch checkpoint tied tensors share
    their storage again, and a nested one is nested again.

    Raises InputError, with nothing written, when ``checkpoint`` is not compressed or a byte of it is not as it was
    written; OutputError when ``out`` exists or cannot be written, UsageError for an unknown suffix.
    """
    started = time.perf_counter()
    out = Path(out)
    dense = view(checkpoint)
    is_folder = checkpoint.folder is not None
    is_torch = not is_folder and _is_torch(out)
    output = Output(
        out, is_folder=is_folder, force=force, inputs=[*checkpoint.files, *filter(None, [checkpoint.folder])]
    )
    for name, entry in dense.manifest.layers.items():
        require_memory(entry.shape, dense.infos[name].dtype.torch or torch.float64, path=checkpoint.path, tensor=name)
    witness = Witness.of(checkpoint.files)
    with output:
        require_whole(checkpoint)
        contents = _contents(dense, device or torch.device("cpu"), ties_apart=not is_torch, progress=progress)
        needed = sum(piece.nbytes for piece in contents.pieces)
        output.require_space(2 * needed if is_torch else needed)
        if is_torch:
            _write_torch(output, contents, dense)
        else:
            shards.write(output.draft, contents, _layout(dense, max_shard_bytes))
        if checkpoint.folder is not None:
            copy_companions(checkpoint.folder, output.draft, without=(out, *checkpoint.files))
            withdraw(output.draft)
        witness.require_unchanged()
        output.commit()
    return DecompressionResult(
        source=describe(checkpoint),
        output=measure(out, is_folder),
        tensors=len(dense.infos),
        rebuilt=len(dense.manifest.layers),
        seconds=time.perf_counter() - started,
    )


def _is_torch(out: Path) -> bool:
    if out.suffix in TORCH_SUFFIXES:
        return True
    if out.suffix == SAFETENSORS_SUFFIX:
        return False
    known = ", ".join([SAFETENSORS_SUFFIX, *sorted(TORCH_SUFFIXES)])
    raise UsageError(f"the output's suffix must be one of {known}", path=out)


def _layout(dense: CompressedView, max_shard_bytes: int | None) -> Layout:
    if dense.checkpoint.folder is None:
        refuse_shards(dense.checkpoint, max_shard_bytes)
        return Layout(None)
    recorded = dense.manifest.source.get("shard_bytes")
    was_sharded = type(recorded) is int and recorded > 0
    return Layout(STEM, max_shard_bytes or (recorded if was_sharded else None), indexed=was_sharded)


def _contents(dense: CompressedView, device: torch.device, *, ties_apart: bool, progress: Progress) -> Contents:
    """Return all tensors to be written; a format without ties holds the second name's tensor once more."""
    names = [name for name in dense.infos if ties_apart or name not in dense.manifest.tied]
    rebuilt = [name for name in names if name in dense.manifest.layers]
    total = sum(dense.infos[name].nbytes for name in rebuilt)
    position, done = 0, 0

    def data(name: str) -> memoryview:
        nonlocal position, done
        if name not in dense.manifest.layers and name not in dense.manifest.tied:
            return dense.checkpoint.raw(name)
        position += 1
        progress(Step("decompressing", min(position, len(rebuilt)), len(rebuilt), name, done, total))
        done = min(done + dense.infos[name].nbytes, total)
        return bytes_of(dense.read(name, device))

    pieces = [
        Piece(name, info.dtype, info.shape, name, partial(data, name)) for name in names for info in [dense.infos[name]]
    ]
    # "format" is what loaders of the Hugging Face family ask for before they read a file.
    metadata = {"format": "pt", **{k: v for k, v in dense.checkpoint.metadata.items() if k != METADATA_KEY}}
    return Contents(pieces, metadata, None)


def _write_torch(output: Output, contents: Contents, dense: CompressedView) -> None:
    """Stage the tensors in a safetensors file first: torch.save wants all of them at once, mapped ones cost nothing."""
    staged = output.workspace / STAGED
    shards.write(staged, contents, Layout(None))
    key = dense.manifest.source.get("key")
    write_torch(
        output.draft,
        SafetensorsFile(staged, own=True),
        names=dense.infos,
        tied=dense.manifest.tied,
        key=key if isinstance(key, str) else None,
    )
    staged.unlink()
