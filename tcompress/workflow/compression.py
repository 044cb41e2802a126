"""compress(): a dense checkpoint and a plan in, a smaller checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tcompress.checkpoint import shards
from tcompress.checkpoint.companions import copy_companions
from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.manifest import Entry, Manifest, is_compressed, shared_stem
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.shards import Contents, Layout
from tcompress.checkpoint.writer import Piece, Spool
from tcompress.errors import FormatError, NumericalError, UsageError
from tcompress.version import __version__
from tcompress.workflow.fitting import StoredFactor, fit
from tcompress.workflow.grouping import Shared, fit_shared
from tcompress.workflow.layout import described, entry_of, is_exact, pieces_of, stored_name
from tcompress.workflow.plan import Plan
from tcompress.workflow.planning import Decision, Settings, decide, resolved
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.results import CompressionResult, LayerResult, Stored, describe, measure

STEM = "model.tcompress"  # not the usual name: a loader that does not know factors must find no weights at all


@dataclass(frozen=True)
class Packed:
    """A compressed layer as it goes into the file: its description and its tensors, with data or still without."""

    entry: Entry
    rebuild: str
    pieces: Sequence[Piece]


def compress(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    out: Path,
    settings: Settings | None = None,
    force: bool = False,
    max_shard_bytes: int | None = None,
    progress: Progress = silent,
) -> CompressionResult:
    """Write the compressed checkpoint to ``out``: a file for a file, a folder for a folder, shards for shards.

    max_shard_bytes: of the output's shards; None takes the size of the input's largest.

    Everything that can be known is checked before the work starts. Raises UsageError for plans that cannot be carried
    out and for a file without the suffix of safetensors, NumericalError for NaN or Inf in the weights, OutputError when
    ``out`` exists or cannot be written.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    if checkpoint.folder is None and out.suffix != SAFETENSORS_SUFFIX:
        raise UsageError(
            f"compressed checkpoints are safetensors files; end the name with {SAFETENSORS_SUFFIX}", path=out
        )
    output = Output(out, is_folder=checkpoint.folder is not None, force=force, inputs=_inputs(checkpoint))
    output.check()
    layout = _layout(checkpoint, max_shard_bytes)
    source, decisions = _prepare(checkpoint, plan, settings, progress)
    with output:
        output.require_space(2 * shards.planned_bytes(_planned(checkpoint, decisions, settings, source), layout))
        with Spool(output.workspace / "spool") as spool:
            packed, results = _fit_all(checkpoint, decisions, settings, spool, progress)
            shards.write(output.draft, _contents(checkpoint, packed, decisions, source), layout)
        left_out = []
        if checkpoint.folder is not None:
            left_out = copy_companions(checkpoint.folder, output.draft, without=(out, *checkpoint.files))
        output.commit()
    written = measure(out, checkpoint.folder is not None)
    return _result(checkpoint, source, decisions, results, written, left_out, started)


def dry_run(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    settings: Settings | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress = silent,
) -> CompressionResult:
    """Return what ``compress`` would do, with the exact bytes of the files it would write; nothing is fitted for it.

    Raises as ``compress`` does, the output aside.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    source, decisions = _prepare(checkpoint, plan, settings, progress)
    planned = _planned(checkpoint, decisions, settings, source)
    nbytes = shards.planned_bytes(planned, _layout(checkpoint, max_shard_bytes))
    results = [
        LayerResult(d.layer, d.format, d.stored_bytes, None, 0.0, d.reason, d.notes, _is_exact(d, settings))
        for d in decisions
    ]
    return _result(checkpoint, source, decisions, results, nbytes, [], started)


def _is_exact(decision: Decision, settings: Settings) -> bool:
    layer = decision.layer
    if decision.format is None or decision.shared is not None:
        return True
    specs = decision.format.factor_specs(layer.shape, settings.stored_type(layer), decision.nonzeros)
    return decision.format.exact_bytes and all(is_exact(spec, decision.nonzeros) for spec in specs.values())


def _prepare(
    checkpoint: Checkpoint, plan: Plan, settings: Settings, progress: Progress
) -> tuple[Stored, list[Decision]]:
    if is_compressed(checkpoint):
        raise UsageError("is compressed already; decompress it first", path=checkpoint.path)
    decisions = decide(checkpoint, find_layers(checkpoint), plan, settings, progress=progress)
    return describe(checkpoint), decisions


def refuse_shards(checkpoint: Checkpoint, max_shard_bytes: int | None) -> None:
    """Raise UsageError when one file is to become shards: they need a folder."""
    if max_shard_bytes is not None:
        raise UsageError("is one file and becomes one file; only folders have shards of a size", path=checkpoint.path)


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    return [*checkpoint.files, *([checkpoint.folder] if checkpoint.folder else [])]


def _layout(checkpoint: Checkpoint, max_shard_bytes: int | None) -> Layout:
    if checkpoint.folder is None:
        refuse_shards(checkpoint, max_shard_bytes)
        return Layout(None)
    largest = max(path.stat().st_size for path in checkpoint.files) if checkpoint.sharded else None
    return Layout(STEM, max_shard_bytes or largest, indexed=checkpoint.sharded)


def _fit_all(
    checkpoint: Checkpoint, decisions: Sequence[Decision], settings: Settings, spool: Spool, progress: Progress
) -> tuple[dict[str, Packed], list[LayerResult]]:
    """Fit layer by layer; finished factors go to the spool at once, and nothing else of them is kept."""
    decided = {decision.layer.name: decision for decision in decisions}
    chosen = (decision.layer for decision in decisions if decision.format is not None)
    packed: dict[str, Packed] = {}
    fitted: dict[str, LayerResult] = {}
    for layer in steps("compressing", chosen, progress):
        setting, notes = decided[layer.name].format, decided[layer.name].notes
        shared = decided[layer.name].shared
        assert setting is not None  # noqa: S101
        if shared is not None:
            if layer == shared.layers[0]:
                _fit_shared(checkpoint, shared, settings, spool, packed, fitted)
            continue
        try:
            found = fit(checkpoint.read(layer.name), setting, store=settings.stored_type(layer), device=settings.device)
        except (NumericalError, FormatError) as error:
            # A layer that cannot be factorised is no reason to lose the others: it stays as it was, and says why.
            fitted[layer.name] = LayerResult(layer, None, layer.dense_bytes, None, 0.0, error.reason)
            continue
        entry = entry_of(layer, setting, found.specs(), norm=found.norm, relative_error=found.relative_error)
        packed[layer.name] = Packed(entry, setting.rebuild, _spooled(layer.name, found.stored, spool, layer.name))
        fitted[layer.name] = LayerResult(
            layer, setting, found.stored_bytes, found.relative_error, found.seconds, notes=notes
        )
        del found
    dense = {
        d.layer.name: LayerResult(d.layer, None, d.layer.dense_bytes, None, 0.0, d.reason)
        for d in decisions
        if d.format is None
    }
    results = {**dense, **fitted}
    return packed, [results[decision.layer.name] for decision in decisions]


def _fit_shared(
    checkpoint: Checkpoint,
    shared: Shared,
    settings: Settings,
    spool: Spool,
    packed: dict[str, Packed],
    fitted: dict[str, LayerResult],
) -> None:
    """Fit a group; its shared factors go with the first member, and all members into one shard."""
    stem, setting = shared_stem(shared.name), shared.setting
    store = settings.stored_type(shared.layers[0])
    try:
        factors, found = fit_shared(checkpoint, shared, store, settings.device)
    except (NumericalError, FormatError) as error:
        for layer in shared.layers:
            fitted[layer.name] = LayerResult(layer, None, layer.dense_bytes, None, 0.0, error.reason)
        return
    for layer, each in zip(shared.layers, found, strict=True):
        figures = {"norm": each.norm, "relative_error": each.relative_error}
        entry = entry_of(layer, setting, shared.own, group=shared.name, **figures)
        pieces = _spooled(layer.name, each.stored, spool, stem)
        if layer == shared.layers[0]:
            pieces = [*_spooled(stem, factors, spool, stem), *pieces]
        packed[layer.name] = Packed(entry, setting.rebuild, pieces)
        fitted[layer.name] = LayerResult(
            layer,
            setting,
            shared.bytes_of(layer),
            each.relative_error,
            each.seconds,
            notes=setting.notes(layer.shape),
        )


def _spooled(stem: str, factors: Mapping[str, StoredFactor], spool: Spool, together: str) -> list[Piece]:
    return [
        spool.put(stored_name(stem, name, part), tensor, together)
        for name, factor in factors.items()
        for part, tensor in factor.parts.items()
    ]


def _planned(checkpoint: Checkpoint, decisions: Sequence[Decision], settings: Settings, source: Stored) -> Contents:
    """Return what would be written, without data."""
    packed = {}
    for decision in decisions:
        layer, shared = decision.layer, decision.shared
        if shared is not None:
            stem = shared_stem(shared.name)
            entry = entry_of(layer, shared.setting, shared.own, group=shared.name)
            pieces = pieces_of(layer.name, shared.own, together=stem)
            if layer == shared.layers[0]:
                pieces = [*pieces_of(stem, shared.specs, together=stem), *pieces]
            packed[layer.name] = Packed(entry, shared.setting.rebuild, pieces)
        elif decision.format is not None:
            specs = decision.format.factor_specs(layer.shape, settings.stored_type(layer), decision.nonzeros)
            entry = entry_of(layer, decision.format, specs)
            packed[layer.name] = Packed(entry, decision.format.rebuild, pieces_of(layer.name, specs))
    return _contents(checkpoint, packed, decisions, source)


def _contents(
    checkpoint: Checkpoint, packed: Mapping[str, Packed], decisions: Sequence[Decision], source: Stored
) -> Contents:
    """Put compressed layers and untouched tensors together, in the order of the source."""
    pieces: list[Piece] = []
    for name, info in checkpoint.items():
        if name in packed:
            pieces += packed[name].pieces
        elif name not in checkpoint.tied:
            pieces.append(Piece(name, info.dtype, info.shape, name, partial(checkpoint.raw, name)))
    origin: dict[str, object] = {"sha256": source.sha256, "bytes": source.nbytes}
    if checkpoint.key is not None:
        origin["key"] = checkpoint.key
    if checkpoint.sharded:
        origin["shard_bytes"] = max(path.stat().st_size for path in checkpoint.files)
    manifest = Manifest(
        writer=f"tcompress {__version__}",
        source=origin,
        tied=dict(checkpoint.tied),
        rebuild={layer.entry.format: layer.rebuild for layer in packed.values()},
        layers={name: layer.entry for name, layer in packed.items()},
        shared={
            shared.name: described(shared.specs)
            for decision in decisions
            if (shared := decision.shared) is not None and decision.layer.name in packed
        },
    )
    return Contents(pieces, checkpoint.metadata, manifest)


def _result(
    checkpoint: Checkpoint,
    source: Stored,
    decisions: Sequence[Decision],
    results: Sequence[LayerResult],
    output: Stored | int,
    left_out: Sequence[str],
    started: float,
) -> CompressionResult:
    notes = [f"{name} was not copied: it holds weights, or lies outside the folder" for name in left_out]
    return CompressionResult(
        source=source,
        output=output if isinstance(output, Stored) else None,
        plan=resolved(decisions).to_json(),
        layers=tuple(results),
        stored_bytes=output.nbytes if isinstance(output, Stored) else output,
        seconds=time.perf_counter() - started,
        other_values=checkpoint.other_values,
        notes=tuple(notes),
    )
