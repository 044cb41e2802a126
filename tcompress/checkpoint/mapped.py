"""One tensor's bytes, mapped from a file for as long as somebody holds them."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import BinaryIO

import torch

from tcompress.checkpoint.reader import TensorInfo
from tcompress.errors import InputError, UnsupportedError

COPIED_BYTES = 1 << 20  # below it reading is cheaper than mapping, and every mapping holds a file descriptor


def map_bytes(path: Path, offset: int, nbytes: int) -> memoryview:
    """Return ``nbytes`` bytes of ``path`` from ``offset``; large ones mapped, and no write reaches the file.

    A mapping per tensor, not per file: it goes when the tensor goes, so that resident memory stays that of the live
    tensors and not that of the whole checkpoint. Raises InputError when the file has become shorter or unreadable.
    """
    if nbytes == 0:
        return memoryview(b"")
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < offset + nbytes:
                raise InputError("was changed while it was read: it is shorter now", path=path)
            return _copied(file, offset, nbytes) if nbytes < COPIED_BYTES else _mapped(file, offset, nbytes)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"its data can no longer be read ({reason}); was the file changed?", path=path) from error


def _mapped(file: BinaryIO, offset: int, nbytes: int) -> memoryview:
    start = offset % mmap.ALLOCATIONGRANULARITY
    try:
        # A private copy: PyTorch wants writable memory, and the file must not change.
        mapped = mmap.mmap(file.fileno(), start + nbytes, access=mmap.ACCESS_COPY, offset=offset - start)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        return _copied(file, offset, nbytes)  # the caller keeps very many tensors
    return memoryview(mapped)[start : start + nbytes]


def _copied(file: BinaryIO, offset: int, nbytes: int) -> memoryview:
    buffer = bytearray(nbytes)
    file.seek(offset)
    if file.readinto(buffer) != nbytes:  # type: ignore[attr-defined]  # every binary file has it
        raise OSError(errno.EIO, "short read")
    return memoryview(buffer)


def tensor_of(raw: memoryview, info: TensorInfo, path: Path) -> torch.Tensor:
    """Return the contiguous tensor that lies in ``raw``, without a copy where its alignment allows it.

    Raises UnsupportedError for an element type that PyTorch cannot hold.
    """
    if info.dtype.torch is None:
        raise UnsupportedError(f"PyTorch has no type for {info.dtype.code} values", path=path, tensor=info.name)
    if info.values == 0:
        return torch.empty(info.shape, dtype=info.dtype.torch)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat.data_ptr() % info.dtype.itemsize:
        flat = flat.clone()  # headers of odd length leave the data between two machine words
    return flat.view(info.dtype.torch).reshape(info.shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return a CPU tensor's bytes in row-major order, as they lie in a checkpoint file."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
