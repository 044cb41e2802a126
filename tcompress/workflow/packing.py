"""Layer by layer: fit, encode, and write down at once what came of it, so that a stopped run can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.journal import Journal, Record
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import Entry, Factor, parse_entry, shared_stem
from tcompress.checkpoint.mapped import tensor_of
from tcompress.checkpoint.reader import Checkpoint, TensorInfo
from tcompress.checkpoint.writer import Piece
from tcompress.encodings import find
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import Format
from tcompress.workflow.aims import Aim
from tcompress.workflow.assumed import assumed_metric
from tcompress.workflow.fitting import Fitted, fit
from tcompress.workflow.grouping import Shared, fit_shared
from tcompress.workflow.layout import described, entry_of, stored_name
from tcompress.workflow.planning import Decision
from tcompress.workflow.progress import Progress, steps
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.results import LayerResult
from tcompress.workflow.settings import Settings
from tcompress.workflow.stored import StoredFactor, rebuild

Named = tuple[str, Tensor, str]  # name and data of a part, and the layer or group that it belongs to


@dataclass(frozen=True)
class Packed:
    """A compressed layer as it goes into the file: its description and its tensors, with data or still without."""

    entry: Entry
    rebuild: str
    pieces: Sequence[Piece]


def fit_all(
    checkpoint: Checkpoint,
    decisions: Sequence[Decision],
    settings: Settings,
    journal: Journal,
    progress: Progress,
    before_each: Callable[[], None],
    reconstruction: Reconstruction | None = None,
) -> tuple[dict[str, Packed], list[LayerResult]]:
    """Fit what the journal does not have yet. Nothing of a finished layer stays in memory but its description.

    reconstruction: says what each layer is to become behind those that are done, and in which order.
    """
    decided = {decision.layer.name: decision for decision in decisions}
    chosen = [decision.layer for decision in decisions if decision.format is not None]
    chosen = chosen if reconstruction is None else reconstruction.ordered(chosen)
    packed: dict[str, Packed] = {}
    results: dict[str, LayerResult] = {
        d.layer.name: LayerResult(d.layer, None, d.layer.dense_bytes, None, 0.0, d.reason)
        for d in decisions
        if d.format is None
    }
    for layer in steps("compressing", chosen, progress):
        before_each()
        decision = decided[layer.name]
        members = [decision] if decision.shared is None else [decided[each.name] for each in decision.shared.layers]
        if layer.name not in packed and layer.name not in results:  # the first of its group that comes
            key = f"layer {members[0].layer.name}"
            known = key in journal
            found = None if known else _finished(checkpoint, members, settings, reconstruction)
            record = journal[key] if found is None else journal.put(key, *found)
            _unpack(record, members, checkpoint, packed, results)
            if reconstruction is not None:
                _install(reconstruction, members, packed, settings)
    return packed, [results[decision.layer.name] for decision in decisions]


def _finished(
    checkpoint: Checkpoint, members: Sequence[Decision], settings: Settings, reconstruction: Reconstruction | None
) -> tuple[Mapping[str, Any], list[Named]]:
    """Fit a layer, or a group as one: what is to be written down, and its tensors in the order of the members."""
    first = members[0]
    # A group is fitted when the first of its members is reached. Those that lie deeper are aimed at what gets there
    # through the prefix so far: what is between is still dense, and cannot be known before the group is.
    aims = [
        None if reconstruction is None else reconstruction.aim(each.layer, checkpoint.read(each.layer.name))
        for each in members
    ]
    try:
        if first.shared is not None:
            return _finished_group(checkpoint, first.shared, first.stored_type, settings, aims)
        return _finished_alone(checkpoint, first, settings, aims[0])
    except (NumericalError, FormatError) as error:
        # A layer that cannot be factorised is no reason to lose the others: it stays as it was, and says why.
        return {"reason": error.reason}, []


def _finished_alone(
    checkpoint: Checkpoint, decision: Decision, settings: Settings, aim: Aim | None
) -> tuple[Mapping[str, Any], list[Named]]:
    layer, setting, weight = decision.layer, decision.format, checkpoint.read(decision.layer.name)
    assert setting is not None  # noqa: S101
    target, metric = (None, assumed_metric(layer, decision.inputs)) if aim is None else (aim.target, aim.metric)
    found = fit(weight, setting, store=decision.stored_type, device=settings.device, target=target, metric=metric)
    entry = entry_of(layer, setting, found.specs(), norm=found.norm, relative_error=found.relative_error)
    parts = list(_parts(layer.name, found.stored, layer.name))
    told = _described(entry, found, found.stored_bytes, len(parts))
    if aim is not None:
        told["output_error"] = _output_error(aim, layer, setting, found.factors, settings)
    return {"members": [told]}, parts


def _output_error(aim: Aim, layer: Layer, setting: Format, factors: Mapping[str, Tensor], settings: Settings) -> float:
    dtype = layer.dtype.torch
    assert dtype is not None, "layers are of floating types"  # noqa: S101
    return aim.output_error(rebuild(setting, layer.shape, factors, dtype=dtype, device=settings.device))


def _install(
    reconstruction: Reconstruction, members: Sequence[Decision], packed: Mapping[str, Packed], settings: Settings
) -> None:
    """Let the layers to come see these as they are stored, whether they were fitted now or by a run before."""
    there = [decision for decision in members if decision.layer.name in packed]
    pieces = {piece.name: piece for decision in there for piece in packed[decision.layer.name].pieces}
    for decision in there:
        layer, setting, shared = decision.layer, decision.format, decision.shared
        dtype = layer.dtype.torch
        assert setting is not None, "it is packed"  # noqa: S101
        assert dtype is not None, "layers are of floating types"  # noqa: S101
        factors = _decoded(layer.name, packed[layer.name].entry.factors, pieces)
        if shared is not None:
            factors |= _decoded(shared_stem(shared.name), described(shared.specs), pieces)
        reconstruction.install(layer, rebuild(setting, layer.shape, factors, dtype=dtype, device=settings.device))


def _decoded(stem: str, factors: Mapping[str, Factor], pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """Return factors as they are written down; stem: what the names of their parts begin with."""
    found = {}
    for name, factor in factors.items():
        coding = find(factor.encoding, factor.values)
        assert coding is not None, "it was written by this version"  # noqa: S101
        parts = {part: _read(pieces[stored_name(stem, name, part)]) for part in coding.part_names}
        shape = factor.shape if factor.shape is not None else tuple(parts[""].shape)
        found[name] = coding.decode(parts, shape)
    return found


def _read(piece: Piece) -> Tensor:
    assert piece.data is not None, "what was written down has its data"  # noqa: S101
    return tensor_of(piece.data(), TensorInfo(piece.name, piece.shape, piece.dtype), Path(piece.name))


def _finished_group(
    checkpoint: Checkpoint, shared: Shared, store: torch.dtype, settings: Settings, aims: Sequence[Aim | None]
) -> tuple[Mapping[str, Any], list[Named]]:
    """Fit a group; its shared factors go with the first member, and all members into one shard."""
    stem = shared_stem(shared.name)
    factors, found = fit_shared(checkpoint, shared, store, settings.device, aims)
    members, parts = [], list(_parts(stem, factors, stem))
    before = 0
    common = {name: factor.values for name, factor in factors.items()}
    for layer, each, aim in zip(shared.layers, found, aims, strict=True):
        figures = {"norm": each.norm, "relative_error": each.relative_error}
        entry = entry_of(layer, shared.setting, shared.own, group=shared.name, **figures)
        parts += _parts(layer.name, each.stored, stem)
        told = _described(entry, each, shared.bytes_of(layer), len(parts) - before)
        if aim is not None:
            whole = {**common, **each.factors}
            told["output_error"] = _output_error(aim, layer, shared.setting, whole, settings)
        members.append(told)
        before = len(parts)
    return {"members": members}, parts


def _parts(stem: str, factors: Mapping[str, StoredFactor], together: str) -> Iterator[Named]:
    for name, factor in factors.items():
        for part, tensor in factor.parts.items():
            yield stored_name(stem, name, part), tensor, together


def _described(entry: Entry, found: Fitted, stored_bytes: int, parts: int) -> dict[str, Any]:
    return {"entry": entry.to_json(), "stored_bytes": stored_bytes, "seconds": found.seconds, "parts": parts}


def _unpack(
    record: Record,
    members: Sequence[Decision],
    checkpoint: Checkpoint,
    packed: dict[str, Packed],
    results: dict[str, LayerResult],
) -> None:
    """Take a finished step apart into its layers."""
    reason = record.found.get("reason")
    start = 0
    for position, decision in enumerate(members):
        layer, setting = decision.layer, decision.format
        assert setting is not None  # noqa: S101
        if reason is not None:
            results[layer.name] = LayerResult(layer, None, layer.dense_bytes, None, 0.0, reason)
            continue
        found = record.found["members"][position]
        entry = parse_entry(layer.name, found["entry"], checkpoint.path)
        pieces = record.pieces[start : start + found["parts"]]
        start += found["parts"]
        packed[layer.name] = Packed(entry, setting.rebuild, pieces)
        results[layer.name] = _result(decision, entry, found)


def _result(decision: Decision, entry: Entry, found: Mapping[str, Any]) -> LayerResult:
    return LayerResult(
        decision.layer,
        decision.format,
        found["stored_bytes"],
        entry.relative_error,
        found["seconds"],
        notes=decision.notes,
        output_error=found.get("output_error"),
        store=decision.store,
    )
