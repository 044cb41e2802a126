"""From what a user names, a file or a folder, to the checkpoint behind it."""

from __future__ import annotations

from pathlib import Path

from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.safetensors_file import SafetensorsFile
from tcompress.checkpoint.sharded import ShardedCheckpoint
from tcompress.checkpoint.torch_file import TorchFile
from tcompress.errors import InputError, listed

INDEX_SUFFIX = ".index.json"
SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = frozenset({".pt", ".pth", ".th", ".bin", ".ckpt"})

# What a folder may hold, best first: ours, safetensors, then pickles; an index before a single file, because a folder
# that has both was sharded last.
_USUAL_NAMES = (
    "model.tcompress.safetensors.index.json",
    "model.tcompress.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def open_checkpoint(path: Path | str, *, key: str | None = None) -> Checkpoint:
    """Open a weight file, an index, or the folder that holds them; nothing but headers is read.

    key: which entry of a nested torch checkpoint holds the state dict, where the usual names do not find it.

    Raises InputError when there is no checkpoint, more than one, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        found = _open_weights(_weights_in(path), key)
        found.folder = path
        return found
    if not path.exists():
        raise InputError("there is no such file or folder", path=path)
    return _open_weights(path, key)


def _open_weights(path: Path, key: str | None) -> Checkpoint:
    if path.name.endswith(INDEX_SUFFIX):
        return ShardedCheckpoint(path, lambda shard: _open_file(shard, key))
    return _open_file(path, key)


def _open_file(path: Path, key: str | None) -> Checkpoint:
    if path.suffix == SAFETENSORS_SUFFIX or _looks_like_safetensors(path):
        return SafetensorsFile(path)
    return TorchFile(path, key)


def _looks_like_safetensors(path: Path) -> bool:
    """Judge by content: a pickle or zip never has an opening brace behind an eight-byte length."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _weights_in(folder: Path) -> Path:
    for name in _USUAL_NAMES:
        if (folder / name).is_file():
            return folder / name
    entries = sorted(folder.iterdir())
    candidates = [entry for entry in entries if entry.name.endswith(SAFETENSORS_SUFFIX + INDEX_SUFFIX)]
    candidates = candidates or [entry for entry in entries if entry.suffix == SAFETENSORS_SUFFIX]
    candidates = candidates or [entry for entry in entries if entry.suffix in TORCH_SUFFIXES]
    if not candidates:
        raise InputError("holds no checkpoint (.safetensors, .pt, .pth, .th, .bin, .ckpt)", path=folder)
    if len(candidates) > 1:
        names = listed([entry.name for entry in candidates])
        raise InputError(f"holds several checkpoints, name one of them: {names}", path=folder)
    return candidates[0]
