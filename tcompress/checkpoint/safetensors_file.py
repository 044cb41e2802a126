"""A single .safetensors file: its header checked twice, its tensors mapped one at a time."""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tcompress.checkpoint.dtypes import BY_CODE
from tcompress.checkpoint.mapped import map_bytes, read_bytes, read_chunks, tensor_of
from tcompress.checkpoint.memory import require_bytes
from tcompress.checkpoint.reader import Checkpoint, TensorInfo
from tcompress.errors import InputError, SafetyError, UnsupportedError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 64
MAX_JSON_VALUES = 3_000_000  # about 400,000 tensors; parsed, JSON takes up to thirty times its bytes
OF_MANIFEST = "its tcompress manifest's"  # what errors call its JSON, which lies inside another


class SafetensorsFile(Checkpoint):
    """One .safetensors file.

    own: nobody but this process writes the file, so that it can be mapped. ``header`` holds the raw first bytes of the
    file, length field included, for those who check them.
    """

    def __init__(self, path: Path, *, own: bool = False) -> None:
        self.path = path
        self._own = own
        self.files = (path,)
        self.tied = {}
        self.other_values = ()
        self.key = None
        self.header, file_bytes = read_header(path)
        entries = parse_object(self.header[8:], path)
        self.metadata = _metadata(entries.pop("__metadata__", {}), path)
        self._offsets, self.infos = _tensors(entries, data_bytes=file_bytes - len(self.header), path=path)
        _ask_safetensors(path)

    def read(self, name: str) -> torch.Tensor:
        return tensor_of(self.raw(name), self.infos[name], self.path)

    def raw(self, name: str) -> memoryview:
        info = self.infos[name]
        require_bytes(info.nbytes, path=self.path, tensor=name)
        fetch = map_bytes if self._own else read_bytes
        return fetch(self.path, len(self.header) + self._offsets[name], info.nbytes)

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes, each lot in the memory of the last one. Raises InputError as ``raw``."""
        return read_chunks(self.path, len(self.header) + self._offsets[name], self.infos[name].nbytes)

    def close(self) -> None:
        """Nothing is held open between reads."""


def read_header(path: Path) -> tuple[bytes, int]:
    """Return the length field and the JSON header of a safetensors file, and the bytes of the whole file.

    Raises InputError when ``path`` is no regular file or cannot begin with such a header.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is not a regular file", path=path)
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > status.st_size - 8:
                raise InputError("is truncated or not a safetensors file; download it again", path=path)
            if length > MAX_HEADER_BYTES:
                raise InputError(f"claims a header of {length} bytes, more than safetensors allows", path=path)
            return start + file.read(length), status.st_size
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error


def parse_object(text: bytes, path: Path, whose: str = "its") -> dict[str, Any]:
    """Parse a JSON object from a stranger, in UTF-8.

    whose: what errors call it. Raises InputError for anything else, duplicate keys, infinite numbers and half
    characters included, SafetyError for more values than any checkpoint has.
    """
    if sum(text.count(mark) for mark in (b"{", b"[", b":")) > MAX_JSON_VALUES:
        raise SafetyError(f"{whose} JSON has more than {MAX_JSON_VALUES} values", path=path)
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{whose} JSON cannot be read ({error})", path=path) from error
    if not isinstance(value, dict) or not text.startswith(b"{"):
        raise InputError(f"{whose} JSON is not an object", path=path)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    for text in (*found, *found.values()):
        if isinstance(text, str):
            text.encode()  # half a surrogate pair, as \ud800, is no text and could never be written again
    return found


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number in it is not finite")
    return value


def _metadata(found: Any, path: Path) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError("its metadata must map strings to strings", path=path)
    return found


def _tensors(
    entries: Mapping[str, Any], *, data_bytes: int, path: Path
) -> tuple[dict[str, int], dict[str, TensorInfo]]:
    """Return every tensor's offset and description, in the order of the data, which must be without hole or overlap."""
    spans = {name: _span(name, entry, path) for name, entry in entries.items()}
    offsets, infos, end = {}, {}, 0
    for name, (begin, stop, info) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != end or stop - begin != info.nbytes:
            raise InputError(
                f"lies at bytes {begin} to {stop}, but {info.nbytes} bytes from {end} were expected",
                path=path,
                tensor=name,
            )
        offsets[name], infos[name], end = begin, info, stop
    if end != data_bytes:
        raise InputError(f"is truncated or damaged: {end} bytes of data declared, {data_bytes} there", path=path)
    return offsets, infos


def _span(name: str, entry: Any, path: Path) -> tuple[int, int, TensorInfo]:
    match entry:
        case {"dtype": str(code), "shape": [*sizes], "data_offsets": [int(begin), int(stop)]}:
            pass
        case _:
            raise InputError("its header entry lacks dtype, shape or data_offsets", path=path, tensor=name)
    if code not in BY_CODE:
        raise UnsupportedError(f"its values are of the unknown type {code}", path=path, tensor=name)
    if len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in sizes):
        raise InputError("its shape is not a short list of sizes", path=path, tensor=name)
    if math.prod(size for size in sizes if size) >= 1 << 63:
        raise InputError("its shape is larger than any memory", path=path, tensor=name)
    return begin, stop, TensorInfo(name, tuple(sizes), BY_CODE[code])


def _ask_safetensors(path: Path) -> None:
    """The library has the last word on what a safetensors file is."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"is not a valid safetensors file ({error})", path=path) from error
