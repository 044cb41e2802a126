"""The name of an output that nobody named."""

from __future__ import annotations

from pathlib import Path

from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX


def default_output(model: Path, word: str) -> Path:
    """Return ``NAME.WORD.safetensors`` for a file and ``NAME-WORD`` for a folder, in the current folder.

    Not beside the model: that may be somebody else's folder, or one that cannot be written.
    """
    if model.is_dir() or model.name.endswith(".index.json"):
        folder = model if model.is_dir() else model.parent
        return Path(f"{_plain(folder.resolve().name)}-{word}")
    return Path(f"{_plain(model.stem)}.{word}{SAFETENSORS_SUFFIX}")


def _plain(name: str) -> str:
    """Drop what an earlier command appended, so that a dense file is not called small.tcompress.dense."""
    return name.removesuffix(".tcompress").removesuffix("-tcompress") or "model"
