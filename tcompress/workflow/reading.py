"""The layers of a compressed checkpoint as they are stored: checked, in memory, and in no model yet."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tcompress.checkpoint.integrity import fingerprint
from tcompress.checkpoint.manifest import shared_stem
from tcompress.errors import FormatError, InputError
from tcompress.formats import Format
from tcompress.runtime.modules import Origin
from tcompress.runtime.packed import Packed, assemble
from tcompress.runtime.ways import dense_weight
from tcompress.workflow.decoding import CompressedView, RawFactor

Held = nn.Parameter | Packed


@dataclass(frozen=True)
class LayerParts:
    """A compressed layer.

    held: every factor's name and what holds it; those that a group shares, named by ``shared``, are the same objects.
    """

    setting: Format
    shape: tuple[int, ...]
    held: Mapping[str, Held]
    origin: Origin
    shared: frozenset[str] = frozenset()

    def copied(self) -> LayerParts:
        """Return the same layer with factors of its own."""
        kept = {id(self.held[name]): self.held[name] for name in self.shared}
        return replace(self, held=copy.deepcopy(dict(self.held), kept))

    def dense(self) -> Tensor:
        """Return the dense weight, in the type that it had."""
        dtype = self.origin.stored_as
        with torch.no_grad():
            return dense_weight(assemble(self.setting, self.shape, self.held, dtype), dtype, dtype)


def read_layers(dense: CompressedView, repaired: Sequence[str] | None = None) -> dict[str, LayerParts]:
    """Read all compressed layers, each as it is stored; what layers share is read once.

    repaired: what the model calls the tensors that were repaired; None for the names that the file has for them.
    Raises InputError when factors are damaged.
    """
    shared: dict[str, Held] = {}
    named = tuple(dense.manifest.repaired if repaired is None else repaired)
    return {name: _read_layer(dense, name, shared, named) for name in dense.manifest.layers}


def _read_layer(dense: CompressedView, name: str, shared: dict[str, Held], repaired: tuple[str, ...]) -> LayerParts:
    entry = dense.manifest.layers[name]
    dtype = entry.dtype.torch
    assert dtype is not None, "manifest entries are of floating types"  # noqa: S101
    setting = dense.setting(name)
    held: dict[str, Held] = {}
    of_group: set[str] = set()
    for raw in dense.raw_factors(name):
        if entry.group is not None and raw.stem == shared_stem(entry.group):
            of_group.add(raw.name)
            held[raw.name] = shared.setdefault(f"{raw.stem}.{raw.name}", _held(raw))
        else:
            held[raw.name] = _held(raw)
    try:
        assemble(setting, entry.shape, held, dtype)
    except FormatError as error:
        raise InputError(error.reason, path=dense.checkpoint.path, tensor=name) from error
    origin = Origin(
        kind=str(entry.kind),
        stored_as=dtype,
        norm=entry.norm,
        relative_error=entry.relative_error,
        fingerprint=fingerprint_of(held),
        group=entry.group,
        source=tuple(dense.manifest.source.items()),
        repaired=repaired,
    )
    return LayerParts(setting, entry.shape, held, origin, frozenset(of_group))


def fingerprint_of(held: Mapping[str, Held]) -> str:
    """Return a digest of all stored tensors of a layer."""
    tensors: list[Tensor] = []
    for _, factor in sorted(held.items()):
        tensors += factor.parts().values() if isinstance(factor, Packed) else [factor]
    return fingerprint(tensor.detach().cpu() for tensor in tensors)


def _held(raw: RawFactor) -> Held:
    # What was read of a compressed file is memory of our own, no mapping: it can be kept, and changed.
    return nn.Parameter(raw.parts[""]) if raw.coding.is_plain_tensor else Packed(raw.coding, raw.parts, raw.shape)
