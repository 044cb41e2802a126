"""The other files of a model's folder: configuration and tokenizer travel along, other copies of the weights do not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tcompress.errors import InputError

# Weights in any form: a compressed folder that still held the dense ones would be larger than before, and a loader
# would find them first.
_WEIGHT_SUFFIXES = frozenset(
    [
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".th",
        ".ckpt",
        ".pkl",
        ".pickle",
        ".joblib",
        ".npz",
        ".npy",
        ".h5",
        ".keras",
        ".msgpack",
        ".ot",
        ".pb",
        ".tflite",
        ".onnx",
        ".onnx_data",
        ".gguf",
        ".ggml",
        ".mlmodel",
    ]
)
INDEX_SUFFIX = ".index.json"  # speaks of weights that are not copied
MAX_DEPTH = 50
_WEIGHT_FILES = frozenset({"tcompress.json", "training_args.bin"})


def copy_companions(source: Path, target: Path, *, without: Iterable[Path]) -> list[str]:
    """Copy all files of a folder but weights, hidden ones and those ``without``; return what else was left out.

    Links are followed inside the folder and into a download cache's blobs beside it, nowhere else: a link in a
    stranger's folder may lead to any file of this machine. Raises InputError for folders that are nested without end.
    """
    left_out, excluded = [], {path.resolve() for path in without}
    for path in _files(source, excluded):
        relative = path.relative_to(source)
        if path.name.endswith(INDEX_SUFFIX):
            continue
        if _is_weights(path) or not _is_at_home(path, source):
            left_out.append(str(relative))
            continue
        destination = target / relative
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, destination)
    return left_out


def _files(source: Path, without: set[Path]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(source):
        if len(Path(folder).relative_to(source).parts) > MAX_DEPTH:
            raise InputError(f"holds folders nested deeper than {MAX_DEPTH}", path=source)
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".")
            and Path(folder, name).resolve() not in without
            and not _is_ours(Path(folder, name))
        )
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file() and path.resolve() not in without:
                yield path


def _is_ours(folder: Path) -> bool:
    """A compressed copy that an earlier run left inside the model's folder."""
    return any(folder.glob("*.tcompress*.safetensors"))


def _is_weights(path: Path) -> bool:
    return path.suffix.lower() in _WEIGHT_SUFFIXES or path.name in _WEIGHT_FILES


def _is_at_home(path: Path, source: Path) -> bool:
    target, home = path.resolve(), source.resolve()
    if home in target.parents:
        return True
    # A download cache has <model>/snapshots/<revision>/unet/config.json -> <model>/blobs/<hash>.
    snapshots = (folder for folder in home.parents if folder.name == "snapshots")
    return any(folder.parent / "blobs" in target.parents for folder in snapshots)
