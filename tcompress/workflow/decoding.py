"""A compressed checkpoint seen as the dense one it stands for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tcompress.checkpoint.manifest import Entry, Factor, Manifest, read_manifest, shared_stem
from tcompress.checkpoint.memory import require_memory
from tcompress.checkpoint.reader import Checkpoint, TensorInfo
from tcompress.encodings import Coding, FactorSpec, find
from tcompress.errors import FormatError, InputError, UnsupportedError
from tcompress.formats import FORMATS, Format, make
from tcompress.formats.grouped import GroupFormat
from tcompress.version import __version__
from tcompress.workflow.layout import stored_name
from tcompress.workflow.settings import STORED_TYPES
from tcompress.workflow.stored import rebuild


@dataclass(frozen=True)
class RawFactor:
    """A factor as it lies on disk. stem: what the names of its parts begin with, the layer's name or its group's."""

    stem: str
    name: str
    coding: Coding
    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]

    def decoded(self) -> Tensor:
        """Return its values. Raises InputError when the parts contradict each other."""
        values = self.coding.decode(self.parts, self.shape)
        if not values.dtype.is_floating_point:
            raise InputError(f"its factor {self.name} is of type {values.dtype}")
        return values


@dataclass(frozen=True)
class CompressedView:
    """The dense tensors of a compressed checkpoint, by their original names.

    infos: every tensor of the original, tied names included. stored: layer -> names of its own parts on disk.
    shared: group -> names of the parts that its members share.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    stored: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, tuple[str, ...]]

    @cached_property
    def infos(self) -> dict[str, TensorInfo]:
        """Descriptions of all original tensors, in the order of the file."""
        owner = {part: layer for layer, parts in self.stored.items() for part in parts}
        of_groups = {part for parts in self.shared.values() for part in parts}
        found: dict[str, TensorInfo] = {}
        for name, info in self.checkpoint.items():
            layer = owner.get(name)
            if name in of_groups:
                continue
            if layer is None:
                found[name] = info
            elif layer not in found:
                entry = self.manifest.layers[layer]
                found[layer] = TensorInfo(layer, entry.shape, entry.dtype)
        for second, first in self.manifest.tied.items():
            found[second] = TensorInfo(second, found[first].shape, found[first].dtype)
        return found

    def setting(self, layer: str) -> Format:
        """Return the format that a layer's entry describes. Raises InputError for options that make no sense."""
        entry = self.manifest.layers[layer]
        try:
            return make(FORMATS[entry.format], entry.options)
        except FormatError as error:
            raise InputError(
                "has senseless options in its manifest entry", path=self.checkpoint.path, tensor=layer
            ) from error

    def stored_bytes(self, layer: str) -> int:
        """Bytes of a compressed layer's parts on disk, with its part of what it shares."""
        own = sum(self.checkpoint[part].nbytes for part in self.stored[layer])
        group = self.manifest.layers[layer].group
        if group is None:
            return own
        members = self.manifest.members(group)
        part, rest = divmod(sum(self.checkpoint[name].nbytes for name in self.shared[group]), len(members))
        return own + part + (rest if layer == members[0] else 0)

    def stored_type(self, layer: str) -> torch.dtype | None:
        """Return the type that a layer's factors are stored in; None where none of them has values."""
        entry = self.manifest.layers[layer]
        found = [(layer, name, factor) for name, factor in entry.factors.items()]
        if entry.group is not None:
            found += [(shared_stem(entry.group), *each) for each in self.manifest.shared[entry.group].items()]
        for stem, name, factor in found:
            if factor.values is not None:
                return STORED_TYPES[factor.values]
            coding = _coding(factor)
            assert coding is not None, "known since the view was made"  # noqa: S101
            types = [self.checkpoint[stored_name(stem, name, part)].dtype for part in coding.part_names]
            if floating := [each.torch for each in types if each.is_floating]:
                return floating[0]
        return None

    def announced(self, layer: str, dtype: torch.dtype) -> Mapping[str, FactorSpec]:
        """Return the factors, shared ones included, that the layer's options announce."""
        setting, entry = self.setting(layer), self.manifest.layers[layer]
        if entry.group is None or not isinstance(setting, GroupFormat):
            return setting.factor_specs(entry.shape, dtype)
        shared, own = setting.group_specs(entry.shape, dtype, len(self.manifest.members(entry.group)))
        return {**shared, **own}

    def read(self, name: str, device: torch.device) -> Tensor:
        """Return a dense tensor under its original name. Raises InputError when its factors are damaged."""
        name = self.manifest.tied.get(name, name)
        entry = self.manifest.layers.get(name)
        return self.checkpoint.read(name) if entry is None else self._rebuild(name, entry, device)

    def _rebuild(self, name: str, entry: Entry, device: torch.device) -> Tensor:
        dtype = entry.dtype.torch
        assert dtype is not None, "manifest entries are of floating types"  # noqa: S101
        require_memory(entry.shape, dtype, path=self.checkpoint.path, tensor=name)
        try:
            factors = dict(self.factors(name))
            return rebuild(self.setting(name), entry.shape, factors, dtype=dtype, device=device)
        except (FormatError, InputError) as error:
            raise InputError(error.reason, path=self.checkpoint.path, tensor=error.tensor or name) from error

    def factors(self, layer: str) -> Iterator[tuple[str, Tensor]]:
        """Yield name and values of each factor of a compressed layer. Raises InputError when they are damaged."""
        for raw in self._raw_factors(layer):
            yield raw.name, raw.decoded()

    def raw_factors(self, layer: str) -> Iterator[RawFactor]:
        """Yield each factor of a compressed layer as it lies on disk. Raises InputError when they are damaged."""
        for raw in self._raw_factors(layer):
            try:
                raw.decoded()
            except InputError as error:
                raise InputError(error.reason, path=self.checkpoint.path, tensor=layer) from error
            yield raw

    def _raw_factors(self, layer: str) -> Iterator[RawFactor]:
        entry = self.manifest.layers[layer]
        most = math.prod(entry.shape)
        found = [(layer, name, factor, most) for name, factor in entry.factors.items()]
        if entry.group is not None:
            stem, most = shared_stem(entry.group), most * len(self.manifest.members(entry.group))
            found += [(stem, name, factor, most) for name, factor in self.manifest.shared[entry.group].items()]
        for stem, name, factor, most in found:
            coding = _coding(factor)
            assert coding is not None, "known since the view was made"  # noqa: S101
            parts = {part: self.checkpoint.read(stored_name(stem, name, part)) for part in coding.part_names}
            shape = factor.shape if factor.shape is not None else tuple(parts[""].shape)
            if factor.shape is not None and math.prod(shape) > most:
                raise InputError(f"its factor {name} claims more values than the weight has")
            require_memory(shape, torch.float32, path=self.checkpoint.path, tensor=layer)
            yield RawFactor(stem, name, coding, parts, shape)


def view(checkpoint: Checkpoint) -> CompressedView:
    """Check a compressed checkpoint's manifest against its tensors, without reading data.

    Raises InputError when it is none or the two disagree, UnsupportedError for formats and encodings that this version
    does not know.
    """
    manifest = read_manifest(checkpoint)
    for name, entry in manifest.layers.items():
        _require_known(checkpoint, name, entry, manifest.writer)
    stored = {name: _parts(checkpoint, name, entry.factors, manifest.writer) for name, entry in manifest.layers.items()}
    for name, entry in manifest.layers.items():
        twice = set(entry.factors) & set(manifest.shared.get(entry.group or "", ()))
        if twice:
            raise InputError(f"has factor {min(twice)} of its own and shares it", path=checkpoint.path, tensor=name)
    shared = {
        group: _parts(checkpoint, shared_stem(group), factors, manifest.writer)
        for group, factors in manifest.shared.items()
    }
    owners: dict[str, str] = {}
    for layer, parts in (*stored.items(), *((shared_stem(group), parts) for group, parts in shared.items())):
        for part in parts:
            if part in owners:
                raise InputError(f"belongs to {owners[part]} and to {layer}", path=checkpoint.path, tensor=part)
            owners[part] = layer
    names = (set(checkpoint) - set(owners)) | set(manifest.layers)
    for layer in manifest.layers:
        if layer in checkpoint:
            raise InputError("is there dense and as factors", path=checkpoint.path, tensor=layer)
    for second, first in manifest.tied.items():
        if first not in names or second in names:
            raise InputError(f"is tied to {first}, which cannot be", path=checkpoint.path, tensor=second)
    return CompressedView(checkpoint, manifest, stored, shared)


def _require_known(checkpoint: Checkpoint, layer: str, entry: Entry, writer: str) -> None:
    if entry.format not in FORMATS:
        raise UnsupportedError(
            f"has format {entry.format!r}, which this version does not know; {_whose(writer)}",
            path=checkpoint.path,
            tensor=layer,
        )
    if (entry.group is not None) != issubclass(FORMATS[entry.format], GroupFormat):
        raise InputError(
            "its manifest entry shares factors where its format has none", path=checkpoint.path, tensor=layer
        )


def _whose(writer: str) -> str:
    """Say who could read what this version cannot: if it says that it is of this version, nobody."""
    if writer == f"tcompress {__version__}":
        return "nor did it write that: the file was changed, or made by something else"
    return f"{writer} wrote it and can read it"


def _parts(checkpoint: Checkpoint, layer: str, factors: Mapping[str, Factor], writer: str) -> tuple[str, ...]:
    names = []
    for name, factor in factors.items():
        coding = _coding(factor)
        if coding is None:
            values = "" if factor.values is None else f" of {factor.values!r}"
            problem = (
                f"its factor {name} has encoding {factor.encoding!r}{values}, which this version cannot read; "
                f"{_whose(writer)}"
            )
            raise UnsupportedError(problem, path=checkpoint.path, tensor=layer)
        names += [stored_name(layer, name, part) for part in coding.part_names]
    missing = [name for name in names if name not in checkpoint]
    if missing:
        raise InputError(f"its factor {missing[0]} is not in the file", path=checkpoint.path, tensor=layer)
    return tuple(names)


def _coding(factor: Factor) -> Coding | None:
    """Return how to decode a factor; None where it is not known, or the shape is there or missing against the rule."""
    coding = find(factor.encoding, factor.values)
    return None if coding is None or coding.is_plain_tensor != (factor.shape is None) else coding
