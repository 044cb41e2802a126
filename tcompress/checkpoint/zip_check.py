"""What a .pt file may look like before PyTorch sees it: its zip members, and the opcodes of its pickle.

Nothing here unpickles, decompresses or allocates by a number that the file claims. ``torch.load(weights_only=True)``
is a filter and not a sandbox: two parsers that disagree about one zip, a compressed member, or a 20-byte pickle that
asks for a terabyte all pass it. Hence it gets a fresh zip that holds only what was checked here (``skeleton``).
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from tcompress.errors import InputError, SafetyError, UnsupportedError

MAX_DIRECTORY_BYTES = 16 << 20  # of the zip's list of members: some 200,000 of them
MAX_PICKLE_BYTES = 64 << 20
MAX_OPCODES = 2_000_000  # some 60,000 tensors; PyTorch's unpickler makes at most one small object of each

MAX_TUPLED = 5 * MAX_OPCODES  # values that tuples hold, counted again wherever one stands in another or is used again

DAMAGED = "is truncated or damaged; download or save it again"
SAVE_AGAIN = "save its state_dict with torch.save or as safetensors"

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1

_HARMLESS = {
    "__builtin__.complex",
    "__builtin__.set",
    "builtins.complex",
    "builtins.set",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
}
_STORAGE = re.compile(r"torch(\.cuda|\.storage)?\.[A-Z][A-Za-z0-9]*Storage")
_STRANGE_TENSORS = {
    "torch._tensor._rebuild_from_type_v2": "is a tensor subclass or carries Python attributes",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "lies on a device that only a PyTorch extension knows",
    "torch._utils._rebuild_device_tensor_from_numpy": "lies on a device that only a PyTorch extension knows",
    "torch._utils._rebuild_meta_tensor_no_storage": "is a meta tensor, which has no data",
    "torch._utils._rebuild_nested_tensor": "is a nested tensor",
    "torch._utils._rebuild_parameter_with_state": "carries Python attributes",
    "torch._utils._rebuild_qtensor": "is quantized",
    "torch._utils._rebuild_sparse_tensor": "is sparse",
    "torch._utils._rebuild_wrapper_subclass": "is a tensor subclass",
}
# PyTorch allows these two, but bytearray(10**12) is all it takes to exhaust the memory, and encode(x, "hex") doubles x.
_BYTES = {"_codecs.encode", "builtins.bytearray", "__builtin__.bytearray"}


@dataclass(frozen=True)
class Record:
    """Where the bytes of one storage lie in the file."""

    offset: int
    size: int


@dataclass(frozen=True)
class Archive:
    """The checked content of a zip: the pickle, and the records of the storages by their key (``"0"``)."""

    pickle: bytes
    storages: dict[str, Record]


def read_zip(file: BinaryIO, path: Path) -> Archive:
    """Check the members of a zip that ``torch.save`` wrote and return where everything is.

    Raises UnsupportedError for a TorchScript archive and for big-endian data, InputError for everything that
    ``torch.save`` does not write: compressed, duplicate, overlapping or absolute members, another zip altogether.
    """
    members = _members(file, path)
    _check_names([member.filename for member in members], path)
    records = _locate(file, members, path)
    prefix = _prefix(records, path)
    if (order := records.get(f"{prefix}byteorder")) and _bytes_of(file, order, path, limit=16) != b"little":
        raise UnsupportedError(
            f"holds big-endian tensors; load it on the machine it came from and {SAVE_AGAIN}", path=path
        )
    data = f"{prefix}data/"
    storages = {name.removeprefix(data): record for name, record in records.items() if name.startswith(data)}
    pickled = _bytes_of(file, records[f"{prefix}data.pkl"], path, limit=MAX_PICKLE_BYTES)
    check_pickles(io.BytesIO(pickled), 1, path)
    return Archive(pickled, storages)


def skeleton(archive: Archive) -> tuple[io.BytesIO, dict[int, Record]]:
    """Return a zip with the same pickle and empty storages, and its record offsets -> the records of the real file.

    PyTorch notes for a tensor without data at which offset of the zip its storage began; with the dictionary
    that number says which record of the file is meant, whatever the layout of the file.
    """
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as out:
        out.writestr(zipfile.ZipInfo("archive/data.pkl"), archive.pickle)
        out.writestr(zipfile.ZipInfo("archive/version"), b"3\n")
        out.writestr(zipfile.ZipInfo("archive/byteorder"), b"little")
        for key in archive.storages:
            out.writestr(zipfile.ZipInfo(f"archive/data/{key}"), b"")
        members = out.infolist()[-len(archive.storages) :] if archive.storages else []
    starts = [_data_start(content, member) for member in members]
    content.seek(0)
    return content, dict(zip(starts, archive.storages.values(), strict=True))


def check_pickles(stream: BinaryIO, count: int, path: Path) -> None:
    """Go through the opcodes of ``count`` pickles, one behind the other, without executing them.

    Raises InputError for a damaged pickle or one that names code, UnsupportedError for tensors and objects that
    are not read, SafetyError for more opcodes than a checkpoint can need.
    """
    opcodes = 0
    for _ in range(count):
        latest = None  # the string seen last: before a value stands its key
        strings: dict[int, str] = {}
        tuples = _Tuples()
        for opcode, argument in _opcodes(stream, path):
            name = opcode.name
            opcodes += 1
            if opcodes > MAX_OPCODES:
                raise SafetyError(f"its pickle has more than {MAX_OPCODES} opcodes; {SAVE_AGAIN}", path=path)
            tuples.follow(opcode, argument)
            if tuples.held > MAX_TUPLED:
                reason = f"its pickle makes tuples of more than {MAX_TUPLED} values; {SAVE_AGAIN}"
                raise SafetyError(reason, path=path)
            if name == "GLOBAL":
                _check_global(str(argument), latest, path)
            elif name == "PROTO" and argument != 2:
                reason = f"uses pickle protocol {argument}; save it again without pickle_protocol, or as safetensors"
                raise UnsupportedError(reason, path=path)
            elif isinstance(argument, str):
                latest = argument
            elif isinstance(argument, int) and name.endswith("BINPUT") and latest is not None:
                strings[argument] = latest
            elif isinstance(argument, int) and name.endswith("BINGET"):
                latest = strings.get(argument, latest)


class _Tuples:
    """How many values the tuples of a pickle hold: a few bytes make tuples that double, and hashing one takes for ever.

    Of the unpickler's stack it keeps these numbers only; a pickle that does not fit its own stack is for others to see.
    """

    def __init__(self) -> None:
        self.held = 0
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[object, int] = {}

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        """Do to the numbers what the opcode does to the values."""
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name == "MARK":
            self._marks.append(len(self._stack))
        elif name.endswith("PUT") or name == "MEMOIZE":
            self._memo[len(self._memo) if argument is None else argument] = self._stack[-1] if self._stack else 1
        elif name.endswith("GET"):
            self._push(self._memo.get(argument, 1))
        elif name == "DUP":
            self._push(self._stack[-1] if self._stack else 1)
        else:
            marked = pickletools.markobject in before
            start = (self._marks.pop() if self._marks else 0) if marked else max(0, len(self._stack) - len(before))
            used = self._stack[start:]
            del self._stack[start:]
            if marked:
                below = before.index(pickletools.markobject)
                del self._stack[max(0, len(self._stack) - below) :]
            self._push(*([1 + sum(used)] if "TUPLE" in name else [1] * len(after)))

    def _push(self, *numbers: int) -> None:
        self._stack += numbers
        self.held += sum(number for number in numbers if number > 1)


class _Bounded:
    """The file as zipfile sees it: it cannot read a list of members so long that parsing it fills the memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell

    def read(self, size: int = -1, /) -> bytes:
        """Read as any file does; raises BadZipFile for more than the longest list."""
        data = self._file.read(size if 0 <= size <= MAX_DIRECTORY_BYTES else MAX_DIRECTORY_BYTES + 1)
        if len(data) > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile("list of members too long")
        return data


def _members(file: BinaryIO, path: Path) -> list[zipfile.ZipInfo]:
    """Return the members as the central directory lists them, in the order of the file."""
    try:
        with zipfile.ZipFile(_Bounded(file)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
        raise InputError(DAMAGED, path=path) from error
    return sorted(members, key=lambda member: member.header_offset)


def _check_names(names: list[str], path: Path) -> None:
    inner = [name.partition("/")[2] for name in names]
    if any(name == "constants.pkl" or name.startswith("code/") for name in inner):
        raise UnsupportedError(
            "is a TorchScript archive, which holds code; save the state_dict of the model instead", path=path
        )
    seen = set()
    for name in names:
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"its zip member {name} has an absolute or '..' name; {SAVE_AGAIN}", path=path)
        if name in seen:
            raise InputError(f"its zip member {name} is there twice; {SAVE_AGAIN}", path=path)
        seen.add(name)


def _prefix(records: dict[str, Record], path: Path) -> str:
    """Return ``"archive/"``, the folder that ``torch.save`` puts everything into."""
    found = [name for name in records if name.rpartition("/")[2] == "data.pkl"]
    if len(found) != 1 or found[0].count("/") != 1:
        raise InputError(
            f"is a zip archive, but not one that torch.save wrote ({len(found)} data.pkl); {SAVE_AGAIN}", path=path
        )
    return found[0].removesuffix("data.pkl")


def _locate(file: BinaryIO, members: list[zipfile.ZipInfo], path: Path) -> dict[str, Record]:
    """Return where the bytes of each member are; no two share a byte and none reaches beyond the file."""
    end = 0
    records = {}
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
            reason = f"its zip member {member.filename} is compressed or encrypted, unlike torch.save's; {SAVE_AGAIN}"
            raise InputError(reason, path=path)
        try:
            start = _data_start(file, member)
        except (OSError, ValueError, struct.error) as error:
            raise InputError(DAMAGED, path=path) from error
        if member.compress_size != member.file_size:
            raise InputError(DAMAGED, path=path)
        if member.header_offset < end:
            raise InputError(f"its zip member {member.filename} overlaps another; {SAVE_AGAIN}", path=path)
        end = start + member.file_size
        records[member.filename] = Record(start, member.file_size)
    if end > file.seek(0, io.SEEK_END):
        raise InputError(DAMAGED, path=path)
    return records


def _data_start(file: BinaryIO, member: zipfile.ZipInfo) -> int:
    """Return the offset of a member's bytes; raises ValueError when its own header contradicts the central one."""
    file.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    magic, flags, method = header[0], header[2], header[3]
    name_bytes, extra_bytes = int(header[-2]), int(header[-1])
    encoding = "utf-8" if flags & 0x800 else "cp437"
    if magic != b"PK\x03\x04" or method or file.read(name_bytes).decode(encoding) != member.orig_filename:
        raise ValueError(member.filename)
    return member.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def _bytes_of(file: BinaryIO, record: Record, path: Path, *, limit: int) -> bytes:
    if record.size > limit:
        raise SafetyError(
            f"its pickle or byteorder has {record.size} bytes, more than {limit}; {SAVE_AGAIN}", path=path
        )
    file.seek(record.offset)
    return file.read(record.size)


def _opcodes(stream: BinaryIO, path: Path) -> Iterator[tuple[pickletools.OpcodeInfo, object]]:
    """Yield each opcode and its argument up to and with STOP."""
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            yield opcode, argument
    except Exception as error:  # whatever the parser stumbles over, the file is to blame
        raise InputError(DAMAGED, path=path) from error


def _check_global(argument: str, latest: str | None, path: Path) -> None:
    """Raise unless ``argument`` (``"module name"``) is part of a plain tensor, dtype or container."""
    module, _, name = argument.partition(" ")
    full = f"{module}.{name}"
    if full in _HARMLESS or _STORAGE.fullmatch(full):
        return
    # vars, not getattr: asking the torch module for an unknown name may import one.
    if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
        return
    if full in _STRANGE_TENSORS:
        raise UnsupportedError(f"{_STRANGE_TENSORS[full]}, which is not read; {SAVE_AGAIN}", path=path, tensor=latest)
    if full in _BYTES:
        raise UnsupportedError(f"holds bytes objects ({full}), which are not read; {SAVE_AGAIN}", path=path)
    raise InputError(f"holds pickled code or objects ({full}), which are never loaded; {SAVE_AGAIN}", path=path)
