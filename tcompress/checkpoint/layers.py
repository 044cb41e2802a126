"""Which tensors of a checkpoint are weights of layers, and of which kind: told by name and shape alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from tcompress.checkpoint.dtypes import DType
from tcompress.checkpoint.reader import Checkpoint, TensorInfo


class LayerKind(StrEnum):
    """What a weight does to its input."""

    LINEAR = "linear"  # (out, in)
    CONV = "conv"  # (out, in / groups, *kernel), one to three spatial sizes
    EMBEDDING = "embedding"  # (rows, width)


@dataclass(frozen=True)
class Layer:
    """One weight that can be factorised."""

    name: str
    kind: LayerKind
    shape: tuple[int, ...]
    dtype: DType

    @property
    def values(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the weight as the checkpoint has it."""
        return self.values * self.dtype.itemsize


_WEIGHT = re.compile(r"weight|kernel", re.IGNORECASE)
_EMBEDDING = re.compile(r"embed|^(emb|wte|wpe|lookup_table)$", re.IGNORECASE)


def find_layers(checkpoint: Checkpoint) -> list[Layer]:
    """Return the layers in the order of the file; of tied names only the first."""
    layers = (layer_of(info) for name, info in checkpoint.items() if name not in checkpoint.tied)
    return [layer for layer in layers if layer is not None]


def layer_of(info: TensorInfo) -> Layer | None:
    """Return the layer that a tensor is the weight of, or None for biases, statistics, tables of integers.

    A weight is real floating point, has two to five dimensions, and says so in the last part of its name.
    """
    if not info.dtype.is_floating or info.values == 0:
        return None
    kind = _kind(info)
    return None if kind is None else Layer(info.name, kind, info.shape, info.dtype)


def _kind(info: TensorInfo) -> LayerKind | None:
    *_, owner, last = "", *info.name.split(".")
    is_weight = _WEIGHT.search(last) is not None
    # The table is a module's weight (word_embeddings.weight) or a bare parameter (pos_embed).
    if len(info.shape) == 2 and _EMBEDDING.search(owner if is_weight else last):
        return LayerKind.EMBEDDING
    if not is_weight:
        return None
    return {2: LayerKind.LINEAR, 3: LayerKind.CONV, 4: LayerKind.CONV, 5: LayerKind.CONV}.get(len(info.shape))
