"""One tensor's bytes: read from a file of the user's, or mapped from one of our own."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch

from tcompress.checkpoint.reader import TensorInfo
from tcompress.errors import InputError, UnsupportedError

_MOST_AT_ONCE = 1 << 30  # bytes that one read of the operating system is asked for; 2 GiB are more than it gives
_MUCH = 1 << 20
_CHUNK = 1 << 20  # bytes that are looked at at one time: they stay in the cache


def read_bytes(path: Path, offset: int, nbytes: int) -> memoryview:
    """Return a copy of ``nbytes`` bytes of ``path`` from ``offset``.

    Not mapped: where somebody shortens a file, the next look at a mapping of it kills the process. Raises InputError
    when the file has become shorter or unreadable.
    """
    if nbytes == 0:
        return memoryview(b"")
    try:
        with path.open("rb") as file:
            _require_length(file, offset + nbytes, path)
            return _copied(file, offset, nbytes)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def read_chunks(path: Path, offset: int, nbytes: int) -> Iterator[memoryview]:
    """Yield ``nbytes`` bytes of ``path`` from ``offset``, some at a time, each lot in the place of the last one.

    Memory that is used again need not be given by the system page by page, which takes ten times what the reading does.
    Raises InputError as ``read_bytes`` does.
    """
    buffer = memoryview(bytearray(min(nbytes, _CHUNK)))
    try:
        with path.open("rb", buffering=0) as file:
            _require_length(file, offset + nbytes, path)
            file.seek(offset)
            while nbytes > 0:
                part = buffer[: min(nbytes, _CHUNK)]
                read = file.readinto(part)
                if not read:
                    raise OSError(errno.EIO, "short read")
                nbytes -= read
                yield part[:read]
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def map_bytes(path: Path, offset: int, nbytes: int) -> memoryview:
    """Return ``nbytes`` bytes of a file that this process wrote, mapped, and no write reaches the file.

    A mapping per tensor, not per file: it goes when the tensor goes, so that resident memory stays that of the live
    tensors. Raises InputError as ``read_bytes`` does.
    """
    if nbytes == 0:
        return memoryview(b"")
    start = offset % mmap.ALLOCATIONGRANULARITY
    try:
        with path.open("rb") as file:
            _require_length(file, offset + nbytes, path)
            try:
                # A private copy: PyTorch wants writable memory, and the file must not change.
                mapped = mmap.mmap(file.fileno(), start + nbytes, access=mmap.ACCESS_COPY, offset=offset - start)
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                return _copied(file, offset, nbytes)  # the caller keeps very many tensors
            return memoryview(mapped)[start : start + nbytes]
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _require_length(file: BinaryIO | FileIO, length: int, path: Path) -> None:
    if os.fstat(file.fileno()).st_size < length:
        raise InputError("was changed while it was read: it is shorter now", path=path)


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"its data can no longer be read ({reason}); was the file changed?", path=path)


def _copied(file: BinaryIO, offset: int, nbytes: int) -> memoryview:
    buffer = _memory(nbytes)
    file.seek(offset)
    for start in range(0, nbytes, _MOST_AT_ONCE):
        part = buffer[start : start + _MOST_AT_ONCE]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]  # every binary file has it
            raise OSError(errno.EIO, "short read")
    return buffer


def _memory(nbytes: int) -> memoryview:
    """Return memory that goes back to the system as soon as it is let go of, if it is much.

    What is freed to the heap stays there where something else was put behind it: reading one large tensor after another
    would leave a process with a multiple of what it keeps.
    """
    if nbytes >= _MUCH:
        try:
            return memoryview(mmap.mmap(-1, nbytes))
        except OSError:  # so many live mappings are not allowed
            pass
    small: memoryview = torch.empty(nbytes, dtype=torch.uint8).numpy().data  # not filled with zeros first
    return small


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
