"""Checkpoints that ``torch.save`` wrote (.pt, .pth, .bin, .ckpt): the structure at once, one tensor's data on demand.

PyTorch unpickles the structure only, as tensors without data; every byte is then found and checked here:
in the zip format each read maps the one tensor it is about. Files of before 2020 are no zips and are read into memory.
"""

from __future__ import annotations

import io
import math
import os
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.mapped import read_bytes
from tcompress.checkpoint.memory import require_bytes
from tcompress.checkpoint.reader import Checkpoint, TensorInfo
from tcompress.checkpoint.state_dict import choose_tensors
from tcompress.checkpoint.zip_check import SAVE_AGAIN, Record, check_pickles, read_zip, skeleton
from tcompress.errors import InputError, SafetyError, UnsupportedError

MAX_EXPANSION = 16  # bytes a tensor may show for each byte it stores; broadcast tensors are small or a bomb
ALWAYS_ALLOWED_BYTES = 64 << 20

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # magic number, protocol, system, the object itself, keys of the storages
_TAR_MAGIC = slice(257, 262)


@dataclass(frozen=True)
class _View:
    """A tensor in the file: the offset of its first element, and how to step from one element to the next."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def span_bytes(self) -> int:
        """Bytes from the first element to the end of the last one, for a tensor that is not empty."""
        return (1 + _last_element(self.shape, self.stride)) * self.dtype.itemsize


class TorchFile(Checkpoint):
    """A checkpoint of ``torch.save``; ``key`` names the entry that holds the tensors (``"state_dict"``, ``"a.b"``).

    Without ``key`` it is the file itself if tensors stand there, else the entry with a usual name, else the only
    one with tensors. Dicts inside it are flattened: ``{"encoder": {"weight": ...}}`` becomes ``encoder.weight``.

    Raises InputError for a file that is damaged, hostile or holds no tensors, UnsupportedError for tensors and
    archives that are not read, SafetyError for tensors that claim far more memory than the file has bytes,
    UsageError for a ``key`` that is not there.
    """

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.files = (path,)
        self.metadata: Mapping[str, str] = {}
        with _open(path) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            tree, records = _load(file, path)
        self.key, tensors, self.other_values = choose_tensors(tree, key, path)
        self.infos = {name: _describe(tensor, name, path) for name, tensor in tensors.items()}
        origins = _memory(tensors, file_bytes, path) if records is None else _records(tensors, records, path)
        self._views = {name: _view(tensor, origins[name]) for name, tensor in tensors.items()}
        self._held = {name: tensor.detach() for name, tensor in tensors.items()} if records is None else {}
        self.tied = _ties(self._views)
        _check_total(self.infos, self.tied, file_bytes, path)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor with the strides it was saved with, on a copy of its own bytes alone."""
        info = self.infos[name]
        if name in self._held:
            return self._held[name]
        view = self._views[name]
        if info.values == 0:
            return torch.empty_strided(view.shape, view.stride, dtype=view.dtype)
        require_bytes(view.span_bytes, path=self.path, tensor=name)
        buffer = read_bytes(self.path, view.offset, view.span_bytes)
        return torch.frombuffer(buffer, dtype=view.dtype).as_strided(view.shape, view.stride)

    def raw(self, name: str) -> memoryview:
        """Return the bytes of ``read(name)`` in row-major order; a copy only if it was saved in another order."""
        flat = self.read(name).contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data.toreadonly()

    def close(self) -> None:
        """Nothing is held open between reads."""


def _open(path: Path) -> io.BufferedReader:
    try:
        # Looked at before it is opened: opening a FIFO waits for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError("is not a regular file; name the checkpoint file itself", path=path)
        return path.open("rb")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a possible file name"
        raise InputError(f"cannot be opened ({reason})", path=path) from error


def _load(file: io.BufferedReader, path: Path) -> tuple[object, dict[int, Record] | None]:
    """Return what was saved: tensors without data and the records of their storages, or None for tensors in memory.

    PyTorch never gets the path, only checked bytes: by a path it would choose another reader for some suffixes.
    """
    head = file.read(512)
    file.seek(0)
    if head.startswith(_ZIP_MAGIC):
        archive = read_zip(file, path)
        if _keeps_offsets():
            content, records = skeleton(archive)
            return _torch_load(content, "meta", path), records
        file.seek(0)
        return _torch_load(file, "cpu", path), None
    if head.startswith(_LEGACY_MAGIC):
        check_pickles(file, _LEGACY_PICKLES, path)
        file.seek(0)
        return _torch_load(file, "cpu", path), None
    if head[_TAR_MAGIC] == b"ustar":
        reason = f"is a tar archive of a PyTorch before 0.2, which is not read; load it there and {SAVE_AGAIN}"
        raise UnsupportedError(reason, path=path)
    if not head:
        raise InputError("is empty; download or save it again", path=path)
    raise InputError(f"is not a file that torch.save wrote; download it again, or {SAVE_AGAIN}", path=path)


def _torch_load(stream: BinaryIO, location: str, path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a hostile pickle can make PyTorch warn about helps nobody
            return torch.load(stream, map_location=location, weights_only=True, mmap=False)
    except Exception as error:  # PyTorch raises a dozen types, with advice over many lines that nobody should follow
        reason = (
            f"is damaged, or not made of plain tensors ({type(error).__name__}); download it again, or {SAVE_AGAIN}"
        )
        raise InputError(reason, path=path) from error


def _keeps_offsets() -> bool:
    """Whether this PyTorch skips the data of meta tensors and notes where it was: from 2.11 on."""
    content = io.BytesIO()
    torch.save(torch.zeros(1), content)
    content.seek(0)
    return _noted_offset(torch.load(content, map_location="meta", weights_only=True)) is not None


def _noted_offset(tensor: torch.Tensor) -> int | None:
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _describe(tensor: torch.Tensor, name: str, path: Path) -> TensorInfo:
    """Check type, element type and geometry with Python's integers, before anything is computed with them."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise UnsupportedError(
            f"is sparse or a tensor subclass, which is not read; {SAVE_AGAIN}", path=path, tensor=name
        )
    dtype = BY_TORCH.get(tensor.dtype)
    if dtype is None or tensor.is_conj() or tensor.is_neg():
        kind = str(tensor.dtype).removeprefix("torch.") if dtype is None else "a conjugate or negative view"
        raise UnsupportedError(f"is {kind}, which is not read; convert it and save it again", path=path, tensor=name)
    shape, stride, start = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    storage_bytes = tensor.untyped_storage().nbytes()
    if start < 0 or min(stride, default=0) < 0 or math.prod(max(n, 1) for n in shape) * dtype.itemsize >= 1 << 63:
        raise InputError(f"has an impossible shape or stride; {SAVE_AGAIN}", path=path, tensor=name)
    info = TensorInfo(name, shape, dtype)
    if info.values and (start + _last_element(shape, stride) + 1) * dtype.itemsize > storage_bytes:
        raise InputError(f"reaches beyond its storage of {storage_bytes} bytes; {SAVE_AGAIN}", path=path, tensor=name)
    if info.nbytes > max(MAX_EXPANSION * storage_bytes, ALWAYS_ALLOWED_BYTES):
        reason = f"claims {info.nbytes} bytes but stores {storage_bytes}; save it without expand"
        raise SafetyError(reason, path=path, tensor=name)
    return info


def _last_element(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def _records(tensors: Mapping[str, torch.Tensor], records: Mapping[int, Record], path: Path) -> dict[str, int]:
    """Return for each tensor where its storage begins in the file; raises InputError unless the record holds it all."""
    origins = {}
    for name, tensor in tensors.items():
        offset = _noted_offset(tensor)
        record = None if offset is None else records.get(offset)
        if record is None or tensor.device.type != "meta":
            raise InputError(f"has no record in the file; {SAVE_AGAIN}", path=path, tensor=name)
        claimed = tensor.untyped_storage().nbytes()
        if claimed > record.size:
            reason = f"claims {claimed} bytes, its record holds {record.size}; {SAVE_AGAIN}"
            raise InputError(reason, path=path, tensor=name)
        origins[name] = record.offset
    return origins


def _memory(tensors: Mapping[str, torch.Tensor], file_bytes: int, path: Path) -> dict[str, int]:
    """Return for each tensor the address of its storage; raises InputError when they hold more than the file."""
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    claimed = sum({storage.data_ptr(): storage.nbytes() for storage in storages.values()}.values())
    if claimed > file_bytes:
        raise InputError(f"its tensors claim {claimed} bytes, the file has {file_bytes}; {SAVE_AGAIN}", path=path)
    return {name: storage.data_ptr() for name, storage in storages.items()}


def _view(tensor: torch.Tensor, origin: int) -> _View:
    offset = origin + tensor.storage_offset() * tensor.dtype.itemsize
    return _View(int(offset), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _ties(views: Mapping[str, _View]) -> dict[str, str]:
    """Return second name -> first name of tensors that are the same elements in the same order."""
    first: dict[_View, str] = {}
    ties = {}
    for name, view in views.items():
        if 0 in view.shape:  # empty tensors share no element
            continue
        owner = first.setdefault(view, name)
        if owner != name:
            ties[name] = owner
    return ties


def _check_total(infos: Mapping[str, TensorInfo], tied: Mapping[str, str], file_bytes: int, path: Path) -> None:
    """Raise SafetyError when many views of the same bytes make a small file large."""
    total = sum(info.nbytes for name, info in infos.items() if name not in tied)
    if total > max(MAX_EXPANSION * file_bytes, ALWAYS_ALLOWED_BYTES):
        raise SafetyError(f"its tensors claim {total} bytes, the file has {file_bytes}; {SAVE_AGAIN}", path=path)
