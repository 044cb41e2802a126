"""Layer by layer: fit, encode, and write down at once what came of it, so that a stopped run can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tcompress.checkpoint.journal import Journal, Record
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import Entry, parse_entry, shared_stem
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.writer import Piece
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import Format
from tcompress.workflow.fitting import Fitted, StoredFactor, fit
from tcompress.workflow.grouping import Shared, fit_shared
from tcompress.workflow.layout import entry_of, stored_name
from tcompress.workflow.planning import Decision
from tcompress.workflow.progress import Progress, steps
from tcompress.workflow.results import LayerResult
from tcompress.workflow.settings import Settings

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
) -> tuple[dict[str, Packed], list[LayerResult]]:
    """Fit what the journal does not have yet. Nothing of a finished layer stays in memory but its description."""
    decided = {decision.layer.name: decision for decision in decisions}
    chosen = (decision.layer for decision in decisions if decision.format is not None)
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
        if layer == members[0].layer:
            key = f"layer {layer.name}"
            record = journal[key] if key in journal else journal.put(key, *_finished(checkpoint, members, settings))
            _unpack(record, members, checkpoint, packed, results)
    return packed, [results[decision.layer.name] for decision in decisions]


def _finished(
    checkpoint: Checkpoint, members: Sequence[Decision], settings: Settings
) -> tuple[Mapping[str, Any], list[Named]]:
    """Fit a layer, or a group as one: what is to be written down, and its tensors in the order of the members."""
    first = members[0]
    assert first.format is not None  # noqa: S101
    try:
        if first.shared is not None:
            return _finished_group(checkpoint, first.shared, settings)
        layer, store = first.layer, settings.stored_type(first.layer)
        found = fit(checkpoint.read(layer.name), first.format, store=store, device=settings.device)
    except (NumericalError, FormatError) as error:
        # A layer that cannot be factorised is no reason to lose the others: it stays as it was, and says why.
        return {"reason": error.reason}, []
    entry = entry_of(layer, first.format, found.specs(), norm=found.norm, relative_error=found.relative_error)
    parts = list(_parts(layer.name, found.stored, layer.name))
    return {"members": [_described(entry, found, found.stored_bytes, len(parts))]}, parts


def _finished_group(
    checkpoint: Checkpoint, shared: Shared, settings: Settings
) -> tuple[Mapping[str, Any], list[Named]]:
    """Fit a group; its shared factors go with the first member, and all members into one shard."""
    stem, store = shared_stem(shared.name), settings.stored_type(shared.layers[0])
    factors, found = fit_shared(checkpoint, shared, store, settings.device)
    members, parts = [], list(_parts(stem, factors, stem))
    before = 0
    for layer, each in zip(shared.layers, found, strict=True):
        figures = {"norm": each.norm, "relative_error": each.relative_error}
        entry = entry_of(layer, shared.setting, shared.own, group=shared.name, **figures)
        parts += _parts(layer.name, each.stored, stem)
        members.append(_described(entry, each, shared.bytes_of(layer), len(parts) - before))
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
        results[layer.name] = _result(layer, setting, entry, found, decision.notes)


def _result(
    layer: Layer, setting: Format, entry: Entry, found: Mapping[str, Any], notes: tuple[str, ...]
) -> LayerResult:
    return LayerResult(layer, setting, found["stored_bytes"], entry.relative_error, found["seconds"], notes=notes)
