"""What an encoding is: one factor tensor <-> the parts that lie on disk, their bytes known before there is any data.

Letters: a factor is (rows, columns) or any other shape, with ``nonzeros`` values whose bits are not all zero.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tcompress.errors import InputError

# The integer type with the same width, through which values are compared bit by bit (-0.0 and NaN included) and
# handed to NumPy, which has no bfloat16.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class PartSpec:
    """Shape and type of one part, before or after it exists."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FactorSpec:
    """Shape and type of a factor; ``nonzeros`` is None for factors without zeros worth leaving out."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nonzeros: int | None = None

    @property
    def values(self) -> int:
        """Number of elements, zeros included."""
        return math.prod(self.shape)


class Encoding(ABC):
    """A way to lay a factor down. Decoding is exact, to the bit."""

    name: ClassVar[str]  # on disk; never changes its meaning once released

    @abstractmethod
    def parts(self, factor: FactorSpec) -> Mapping[str, PartSpec] | None:
        """Return what would lie on disk, by part name; None when this encoding cannot hold the factor."""

    @abstractmethod
    def encode(self, factor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return the parts of a CPU tensor."""

    @abstractmethod
    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """Return the factor. Raises InputError when the parts contradict each other or the shape."""

    def nbytes(self, factor: FactorSpec) -> int | None:
        """Bytes of all parts on disk; None when this encoding cannot hold the factor."""
        parts = self.parts(factor)
        return None if parts is None else sum(part.nbytes for part in parts.values())


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values of a contiguous tensor as integers of the same width."""
    return tensor.contiguous().view(BITS[tensor.dtype.itemsize])


def require(condition: bool, problem: str) -> None:
    """Raise InputError with ``problem`` unless ``condition`` holds."""
    if not condition:
        raise InputError(problem)
