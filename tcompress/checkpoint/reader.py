"""What every checkpoint looks like from inside: names, shapes and types at once, the data of one tensor on demand."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from tcompress.checkpoint.dtypes import DType


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; no data is touched to make it."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the contiguous data."""
        return (self.values * self.dtype.bits + 7) // 8


class Checkpoint(Mapping[str, TensorInfo], ABC):
    """Named tensors in one or more files, in the order of the file.

    path: what the user named, a file or a folder.
    files: the weight files behind it.
    folder: the folder it was found in when a folder was named, else None.
    sharded: whether an index says which file holds which tensor.
    shards: one checkpoint per file; the checkpoint itself where there is only one.
    metadata: str -> str, as safetensors has it.
    tied: second name -> first name, for tensors that share one storage; both names are in the mapping.
    other_values: names of values beside the tensors (``epoch``, ``optimizer``), which are not carried over.
    key: the entry of a nested checkpoint that holds the tensors (``state_dict``), or None.
    """

    path: Path
    files: tuple[Path, ...]
    folder: Path | None = None
    sharded: bool = False
    metadata: Mapping[str, str]
    tied: Mapping[str, str]
    other_values: tuple[str, ...]
    key: str | None
    infos: Mapping[str, TensorInfo]

    @property
    def shards(self) -> tuple[Checkpoint, ...]:
        """One checkpoint per file."""
        return (self,)

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU; it may lie on the mapped file, so it must not be changed in place.

        Raises InputError when its bytes cannot be read, UnsupportedError for a type that PyTorch cannot hold.
        """

    @abstractmethod
    def raw(self, name: str) -> memoryview:
        """Return the tensor's bytes, contiguous and little-endian, without a copy where the file allows it.

        Raises InputError when they cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the files."""

    def __getitem__(self, name: str) -> TensorInfo:
        return self.infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
