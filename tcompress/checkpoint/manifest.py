"""What a compressed file says of itself: JSON under one metadata key, parsed with distrust.

The layout is version 1. It is compact because on small models the header is a real part of the file: nothing stands in
it that can be read off the tensors, and the formula of each format stands once.
"""

from __future__ import annotations

import decimal
import json
import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tcompress.checkpoint.dtypes import BY_NAME, DType
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.safetensors_file import OF_MANIFEST, parse_object
from tcompress.checkpoint.state_dict import MAX_DEPTH
from tcompress.errors import InputError, UnsupportedError

METADATA_KEY = "tcompress"
VERSION = 1
_CEILING = decimal.Context(prec=7, rounding=decimal.ROUND_CEILING)
WIDEST = 1.234567e15  # no figure rounded by `figure` has a longer text: below 1e16 Python writes all digits out
SIDECAR = "tcompress.json"  # the whole model's manifest beside its shards


@dataclass(frozen=True)
class Factor:
    """How one factor lies on disk; ``shape`` is None for dense factors, whose tensor has it.

    values: the name of the codes that stand for its values, None for values as they are.
    """

    encoding: str
    shape: tuple[int, ...] | None = None
    values: str | None = None

    def to_json(self) -> Any:
        """Return the encoding's name alone where that says it all."""
        if self.shape is None:
            return self.encoding
        values = {} if self.values is None else {"values": self.values}
        return {"encoding": self.encoding, "shape": list(self.shape), **values}


@dataclass(frozen=True)
class Entry:
    """One compressed layer.

    group: the group whose shared factors it uses beside its own.
    shape, dtype: of the dense weight. norm: its Frobenius norm. relative_error: of the weight that the stored factors
    give, in the weight's own dtype; None where they were changed afterwards and the weight was not at hand.
    """

    format: str
    options: Mapping[str, Any]
    kind: LayerKind
    shape: tuple[int, ...]
    dtype: DType
    norm: float
    relative_error: float | None
    factors: Mapping[str, Factor]
    group: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the entry as it stands in the manifest."""
        group = {} if self.group is None else {"group": self.group}
        return {
            **group,
            "format": self.format,
            "options": dict(self.options),
            "kind": str(self.kind),
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "norm": self.norm,
            "relative_error": self.relative_error,
            "factors": {name: factor.to_json() for name, factor in self.factors.items()},
        }


@dataclass(frozen=True)
class Manifest:
    """Everything that a compressed checkpoint says of itself.

    source: sha256 and bytes of the checkpoint it was made from, and what is needed to lay it out again.
    tied: second name -> first name. rebuild: format name -> formula. layers: weight name -> entry.
    shared: group -> the factors that its members share. repaired: tensors, sorted, that are not compressed and yet have
    other values than in the source.
    """

    writer: str
    source: Mapping[str, Any] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    rebuild: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, Entry] = field(default_factory=dict)
    shared: Mapping[str, Mapping[str, Factor]] = field(default_factory=dict)
    repaired: tuple[str, ...] = ()

    def members(self, group: str) -> list[str]:
        """Return the layers of a group."""
        return [name for name, entry in self.layers.items() if entry.group == group]

    def reserved(self) -> Manifest:
        """Return a manifest of the greatest length that this one can have once its figures are known."""
        widest = {name: replace(entry, norm=WIDEST, relative_error=WIDEST) for name, entry in self.layers.items()}
        return replace(self, layers=widest)

    def only(self, names: Collection[str]) -> Manifest:
        """Return the manifest of a shard that holds just these of the original's tensors, with their ties.

        A group stands for all of its members, under the name that its shared tensors begin with.
        """
        groups = {group for group in self.shared if shared_stem(group) in names}
        chosen = {name: entry for name, entry in self.layers.items() if name in names or entry.group in groups}
        formulas = {entry.format for entry in chosen.values()}
        rebuild = {name: text for name, text in self.rebuild.items() if name in formulas}
        tied = {second: first for second, first in self.tied.items() if first in names or first in chosen}
        shared = {group: factors for group, factors in self.shared.items() if group in groups}
        repaired = tuple(name for name in self.repaired if name in names)
        return replace(self, layers=chosen, rebuild=rebuild, tied=tied, shared=shared, repaired=repaired)

    def to_json(self) -> dict[str, Any]:
        """Return the document, without the hashes that the writer adds."""
        shared = {
            group: {name: factor.to_json() for name, factor in factors.items()}
            for group, factors in self.shared.items()
        }
        return {
            **({"shared": shared} if shared else {}),
            **({"repaired": list(self.repaired)} if self.repaired else {}),
            "version": VERSION,
            "writer": self.writer,
            "source": dict(self.source),
            "tied": dict(self.tied),
            "rebuild": dict(self.rebuild),
            "layers": {name: entry.to_json() for name, entry in self.layers.items()},
        }


def shared_stem(group: str) -> str:
    """Return what the names of a group's shared tensors begin with, in place of a layer's name."""
    return f"shared.{group}"


def figure(value: float) -> float:
    """Round up to seven significant digits: short in JSON, and an error is never reported smaller than it is."""
    nearest = float(f"{value:.6e}")
    return nearest if nearest == value else float(_CEILING.create_decimal_from_float(value))


def compact_json(document: Mapping[str, Any]) -> str:
    """Return sorted JSON without white space: the same content always gives the same bytes."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Tell whether the checkpoint carries a manifest."""
    return any(METADATA_KEY in shard.metadata for shard in checkpoint.shards)


def read_manifest(checkpoint: Checkpoint) -> Manifest:
    """Return the manifest of all shards together.

    Raises InputError when there is none or it is damaged, UnsupportedError when a newer version wrote it.
    """
    found: Manifest | None = None
    for shard in checkpoint.shards:
        text = shard.metadata.get(METADATA_KEY)
        if text is None:
            raise InputError("is not a compressed checkpoint: it has no tcompress manifest", path=shard.path)
        manifest = parse_manifest(text, shard.path)
        if found is None:
            found = manifest
            continue
        if manifest.source != found.source:
            raise InputError("is a shard of another checkpoint than the others", path=shard.path)
        repeated = (set(found.layers) & set(manifest.layers)) | (set(found.shared) & set(manifest.shared))
        repeated |= set(found.repaired) & set(manifest.repaired)
        if repeated:
            raise InputError("is described in two shards", path=shard.path, tensor=min(repeated))
        found = replace(
            found,
            layers={**found.layers, **manifest.layers},
            rebuild={**found.rebuild, **manifest.rebuild},
            tied={**found.tied, **manifest.tied},
            shared={**found.shared, **manifest.shared},
            repaired=tuple(sorted((*found.repaired, *manifest.repaired))),
        )
    assert found is not None, "a checkpoint has at least one shard"  # noqa: S101
    return found


def parse_manifest(text: str, path: Path) -> Manifest:
    """Parse one manifest; raises InputError or UnsupportedError as read_manifest does."""
    document = parse_object(text.encode(), path, OF_MANIFEST)
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise InputError("its tcompress manifest has no version", path=path)
    if version > VERSION:
        writer = document.get("writer")
        raise UnsupportedError(
            f"was written by {writer if isinstance(writer, str) else 'a newer tcompress'} as version {version}; "
            f"this tcompress reads up to version {VERSION}, a newer one is needed",
            path=path,
        )
    match document:
        case {
            "writer": str(writer),
            "source": dict(source),
            "tied": dict(tied),
            "rebuild": dict(rebuild),
            "layers": dict(layers),
        }:
            pass
        case _:
            raise InputError("its tcompress manifest lacks writer, source, tied, rebuild or layers", path=path)
    for name, value in (*tied.items(), *rebuild.items()):
        if not isinstance(value, str):
            raise InputError(
                "its tcompress manifest ties or rebuilds it with something that is no text", path=path, tensor=name
            )
    key = source.get("key")
    if isinstance(key, str) and key.count(".") >= MAX_DEPTH:
        raise InputError(f"its tcompress manifest has a key nested deeper than {MAX_DEPTH}", path=path)
    entries = {name: parse_entry(name, entry, path) for name, entry in layers.items()}
    shared = _shared(document.get("shared", {}), entries, path)
    repaired = _repaired(document.get("repaired", []), entries, path)
    return Manifest(writer, source, tied, rebuild, entries, shared, repaired)


def _repaired(names: Any, entries: Mapping[str, Entry], path: Path) -> tuple[str, ...]:
    """Parse the names of repaired tensors: each once, and none of a compressed layer."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError("its tcompress manifest names repaired tensors with something that is no text", path=path)
    if len(set(names)) != len(names) or not entries.keys().isdisjoint(names):
        problem = "its tcompress manifest names repaired tensors twice, or such as are compressed"
        raise InputError(problem, path=path)
    return tuple(sorted(names))


def _shared(groups: Any, entries: Mapping[str, Entry], path: Path) -> dict[str, dict[str, Factor]]:
    """Parse the factors of groups: every group has members, and every member its group."""
    used = {entry.group for entry in entries.values() if entry.group is not None}
    if not isinstance(groups, dict) or set(groups) != used:
        raise InputError("its tcompress manifest has groups without members, or members without groups", path=path)
    parsed = {}
    for group, factors in groups.items():
        if not isinstance(factors, dict) or not factors:
            raise InputError("its manifest entry of shared factors is damaged", path=path, tensor=group)
        parsed[group] = {name: _factor(name, value, group, path) for name, value in factors.items()}
    return parsed


def parse_entry(name: str, entry: Any, path: Path) -> Entry:
    """Parse the entry of a layer. Raises InputError when it is none."""
    match entry:
        case {
            "format": str(format_name),
            "options": dict(options),
            "kind": "linear" | "conv" | "embedding" as kind,
            "shape": [*sizes],
            "dtype": str(dtype),
            "norm": norm,
            "relative_error": error,
            "factors": dict(factors),
        } if (
            dtype in BY_NAME
            and _is_shape(sizes)
            and _is_figure(norm)
            and (error is None or _is_figure(error))
            and (factors)
        ):
            pass
        case _:
            raise InputError("its manifest entry is damaged", path=path, tensor=name)
    if not BY_NAME[dtype].is_floating:
        raise InputError(f"its manifest entry claims factors for {dtype} values", path=path, tensor=name)
    group = entry.get("group")
    if group is not None and not isinstance(group, str):
        raise InputError("its manifest entry names a group that is no text", path=path, tensor=name)
    parsed = {factor: _factor(factor, value, name, path) for factor, value in factors.items()}
    return Entry(format_name, options, LayerKind(kind), tuple(sizes), BY_NAME[dtype], norm, error, parsed, group)


def _factor(factor: str, value: Any, layer: str, path: Path) -> Factor:
    match value:
        case str(encoding):
            return Factor(encoding)
        case {"encoding": str(encoding), "shape": [*sizes], "values": str(values)} if _is_shape(sizes):
            return Factor(encoding, tuple(sizes), values)
        case {"encoding": str(encoding), "shape": [*sizes]} if _is_shape(sizes) and "values" not in value:
            return Factor(encoding, tuple(sizes))
    raise InputError(f"its manifest entry for factor {factor} is damaged", path=path, tensor=layer)


def _is_figure(value: Any) -> bool:
    # Not math.isfinite: a whole number of four hundred digits is finite and still no float.
    return type(value) in {int, float} and 0 <= value <= sys.float_info.max


def _is_shape(sizes: list[Any]) -> bool:
    sane = len(sizes) <= 64 and all(type(size) is int and size >= 0 for size in sizes)
    return sane and math.prod(size for size in sizes if size) < 1 << 63
