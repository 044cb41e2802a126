"""What a case is, and the table that all of them stand in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

COMMANDS = ("inspect", "analyze", "compress", "decompress", "verify")
DENSE = "is not a compressed checkpoint"
COMPRESSED = "is compressed already"


@dataclass(frozen=True)
class Case:
    """A checkpoint, and what each command has to answer to it.

    build: writes it into a folder and returns what is named on the command line.
    expected: command -> exit code and what the answer must contain beside the name of the file.
    """

    build: Callable[[Path], Path]
    expected: dict[str, tuple[int, tuple[str, ...]]]

    @property
    def is_legal(self) -> bool:
        """Whether it can be compressed, decompressed or both."""
        return self.expected["compress"][0] == 0 or self.expected["decompress"][0] == 0


CASES: dict[str, Case] = {}


def add(name: str, build: Callable[[Path], Path], **expected: tuple[int, tuple[str, ...]]) -> None:
    assert name not in CASES, f"{name} stands there twice"
    assert set(expected) == set(COMMANDS)
    CASES[name] = Case(build, expected)


def refused(
    name: str, build: Callable[[Path], Path], *words: str, tensor: str | None = None, code: int = 4, **other: int
) -> None:
    """Add a checkpoint that no command takes; ``other`` names the commands with another exit code."""
    said = words if tensor is None else (f"tensor {tensor}: ", *words)
    add(name, build, **{command: (other.get(command, code), said) for command in COMMANDS})


def dense(name: str, build: Callable[[Path], Path], *words: str, **codes: int) -> None:
    """Add a legal checkpoint that is not compressed; ``words`` are those of the commands in ``codes``."""
    usual: dict[str, tuple[int, tuple[str, ...]]] = dict.fromkeys(COMMANDS, (0, ()))
    usual |= dict.fromkeys(("decompress", "verify"), (4, (DENSE,)))
    add(name, build, **usual | {command: (code, words) for command, code in codes.items()})


def compressed(
    name: str, build: Callable[[Path], Path], *words: str, inspect: int = 0, decompress: int = 4, verify: int = 8
) -> None:
    """Add a compressed checkpoint; ``words`` are those of the commands that do not take it."""
    codes = {"inspect": inspect, "decompress": decompress, "verify": verify}
    own = {command: (code, words if code else ()) for command, code in codes.items()}
    add(name, build, **dict.fromkeys(("analyze", "compress"), (2, (COMPRESSED,))), **own)


def framed(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file: a header, as it is or as JSON, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object = (2,), offsets: object = (0, 8), dtype: object = "F32") -> dict[str, object]:
    """Return a tensor's entry in a header; as it stands, a sound one over 8 bytes."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(content: bytes, name: str = "model.safetensors") -> Callable[[Path], Path]:
    """Return a builder of one file."""

    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def tensors_of(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Return a sound safetensors file of these tensors, whatever their names."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        raw = raw_bytes(tensor)
        header[name] = entry(list(tensor.shape), [len(data), len(data) + len(raw)], CODES[tensor.dtype])
        data += raw
    return framed(header, data)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
}


def weight(rows: int = 48, columns: int = 40, seed: int = 0) -> torch.Tensor:
    """Return a matrix of low rank plus noise."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return low + 0.01 * torch.randn(rows, columns, generator=generator)
