"""compress(): a dense checkpoint and a plan in, a smaller checkpoint out, one layer in memory at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tcompress.checkpoint import shards
from tcompress.checkpoint.companions import copy_companions
from tcompress.checkpoint.journal import Journal
from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.checkpoint.manifest import Manifest, is_compressed, shared_stem
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.shards import Contents, Layout
from tcompress.checkpoint.unchanged import Witness
from tcompress.checkpoint.writer import Piece
from tcompress.errors import UsageError
from tcompress.formats import Format, from_dict, to_dict
from tcompress.version import __version__
from tcompress.workflow.checking import check_plan
from tcompress.workflow.hugging_face import STEM, announce
from tcompress.workflow.layout import described, entry_of, is_exact, pieces_of
from tcompress.workflow.packing import Packed, fit_all
from tcompress.workflow.plan import Plan
from tcompress.workflow.planning import Decision, decide, resolved
from tcompress.workflow.progress import Progress, silent
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.repairs import may_change, repairs
from tcompress.workflow.results import CompressionResult, LayerResult, Repairs, Stored, describe, measure
from tcompress.workflow.settings import Settings


def compress(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    out: Path | str,
    settings: Settings | None = None,
    force: bool = False,
    max_shard_bytes: int | None = None,
    reconstruction: Reconstruction | None = None,
    progress: Progress = silent,
) -> CompressionResult:
    """Write the compressed checkpoint to ``out``: a file for a file, a folder for a folder, shards for shards.

    max_shard_bytes: of the output's shards; None takes the size of the input's largest. reconstruction: the model and
    its calibration inputs; each layer is then fitted to give, behind the layers that are done, the dense model's
    output, and what ``repairs`` finds is kept where it helps.

    A run that is stopped by a signal, or killed, leaves what it finished beside ``out``; the same call goes on from
    there and writes the same bytes.

    Everything that can be known is checked before the work starts. Raises UsageError for plans that cannot be carried
    out and for a file without the suffix of safetensors, NumericalError for NaN or Inf in the weights, OutputError when
    ``out`` exists or cannot be written, LockedError while another run writes it, InputError when the checkpoint changes
    on the way.
    """
    started = time.perf_counter()
    out, settings = Path(out), settings or Settings()
    output = checked_output(checkpoint, out, force=force)
    layout = layout_of(checkpoint, max_shard_bytes)
    _require_dense(checkpoint)
    check_plan(checkpoint, find_layers(checkpoint), plan, settings)
    witness = Witness.of(checkpoint.files)
    source = describe(checkpoint)
    with output, Journal(output.workspace, run_of(checkpoint, plan, settings, source, reconstruction)) as journal:
        output.is_worth_keeping = lambda: len(journal) > 0
        decisions = _decided(checkpoint, plan, settings, progress, journal)
        planned = planned_contents(checkpoint, decisions, source, may_change(checkpoint, reconstruction))
        output.require_space(2 * shards.planned_bytes(planned, layout))
        packed, results = fit_all(
            checkpoint, decisions, settings, journal, progress, witness.require_unchanged, reconstruction
        )
        repaired: tuple[Mapping[str, Piece], Repairs | None] = ({}, None)
        if reconstruction is not None and reconstruction.repair and packed:
            repaired = repairs(checkpoint, reconstruction, journal, progress)
        shards.write(output.draft, _contents(checkpoint, packed, decisions, source, repaired[0]), layout)
        remarks: list[str] = []
        if checkpoint.folder is not None:
            left_out = copy_companions(checkpoint.folder, output.draft, without=(out, *checkpoint.files))
            remarks = [*map(_not_copied, left_out), *announce(output.draft, checkpoint)]
        witness.require_unchanged(lambda: describe(checkpoint).sha256 == source.sha256)
        output.commit()
    written = measure(out, checkpoint.folder is not None)
    found = _result(checkpoint, source, decisions, results, written, [*_story(journal), *remarks], started)
    return replace(found, repairs=repaired[1])


def checked_output(checkpoint: Checkpoint, out: Path, *, force: bool) -> Output:
    """Return the output of a compression, nothing of it written yet.

    Raises UsageError for a file without the suffix of safetensors, OutputError when it exists or cannot be written.
    """
    if checkpoint.folder is None and out.suffix != SAFETENSORS_SUFFIX:
        raise UsageError(
            f"compressed checkpoints are safetensors files; end the name with {SAFETENSORS_SUFFIX}", path=out
        )
    output = Output(out, is_folder=checkpoint.folder is not None, force=force, inputs=_inputs(checkpoint))
    output.check()
    return output


def run_of(
    checkpoint: Checkpoint, plan: Plan, settings: Settings, source: Stored, reconstruction: Reconstruction | None
) -> dict[str, Any]:
    """Return what two runs must have in common to write the same bytes, the layout aside."""
    return {
        "tcompress": __version__,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "source": source.sha256,
        "key": checkpoint.key,
        "plan": plan.to_json(),
        "store": str(settings.store),
        "device": str(settings.device),
        "allow_nonfinite": settings.allow_nonfinite,
        "joint_as_asked": settings.joint_as_asked,
        "reconstruction": None if reconstruction is None else reconstruction.fingerprint,
    }


def _decided(
    checkpoint: Checkpoint, plan: Plan, settings: Settings, progress: Progress, journal: Journal
) -> list[Decision]:
    """Decide about every layer; a setting that had to be searched for is written down as well."""

    def recall(layer: Layer, find: Callable[[], Format | str]) -> Format | str:
        key = f"setting {layer.name}"
        if key not in journal:
            found = find()
            journal.put(key, {"reason": found} if isinstance(found, str) else {"setting": to_dict(found)})
        known = journal[key].found
        return str(known["reason"]) if "reason" in known else from_dict(known["setting"])

    return decide(checkpoint, find_layers(checkpoint), plan, settings, progress=progress, recall=recall)


def _story(journal: Journal) -> list[str]:
    if journal.restarted:
        return ["what an unfinished run with other settings had left was thrown away"]
    return [f"went on from {journal.resumed} finished steps of a run that was stopped"] if journal.resumed else []


def _not_copied(name: str) -> str:
    return f"{name} was not copied: it holds weights, or lies outside the folder"


def dry_run(
    checkpoint: Checkpoint,
    plan: Plan,
    *,
    settings: Settings | None = None,
    max_shard_bytes: int | None = None,
    reconstruction: Reconstruction | None = None,
    progress: Progress = silent,
) -> CompressionResult:
    """Return what ``compress`` would do, with the exact bytes of the files it would write; nothing is fitted for it.

    With a model they are a bound where tensors may be repaired: the file names those that are.

    Raises as ``compress`` does, the output aside.
    """
    started = time.perf_counter()
    settings = settings or Settings()
    _require_dense(checkpoint)
    decisions = decide(checkpoint, find_layers(checkpoint), plan, settings, progress=progress)
    source = describe(checkpoint)
    named = may_change(checkpoint, reconstruction)
    planned = planned_contents(checkpoint, decisions, source, named)
    nbytes = shards.planned_bytes(planned, layout_of(checkpoint, max_shard_bytes))
    results = [
        LayerResult(d.layer, d.format, d.stored_bytes, None, 0.0, d.reason, d.notes, _is_exact(d), store=d.store)
        for d in decisions
    ]
    found = _result(checkpoint, source, decisions, results, nbytes, [], started)
    return replace(found, may_be_repaired=bool(named))


def _is_exact(decision: Decision) -> bool:
    layer = decision.layer
    if decision.format is None or decision.shared is not None:
        return True
    specs = decision.format.factor_specs(layer.shape, decision.stored_type, decision.nonzeros)
    return decision.format.exact_bytes and all(is_exact(spec, decision.nonzeros) for spec in specs.values())


def _require_dense(checkpoint: Checkpoint) -> None:
    if is_compressed(checkpoint):
        raise UsageError("is compressed already; decompress it first", path=checkpoint.path)


def refuse_shards(checkpoint: Checkpoint, max_shard_bytes: int | None) -> None:
    """Raise UsageError when one file is to become shards: they need a folder."""
    if max_shard_bytes is not None:
        raise UsageError("is one file and becomes one file; only folders have shards of a size", path=checkpoint.path)


def _inputs(checkpoint: Checkpoint) -> list[Path]:
    return [*checkpoint.files, *([checkpoint.folder] if checkpoint.folder else [])]


def layout_of(checkpoint: Checkpoint, max_shard_bytes: int | None) -> Layout:
    """Return how the output lies where the input lies like this: a file for a file, shards for shards."""
    if checkpoint.folder is None:
        refuse_shards(checkpoint, max_shard_bytes)
        return Layout(None)
    largest = max(path.stat().st_size for path in checkpoint.files) if checkpoint.sharded else None
    return Layout(STEM, max_shard_bytes or largest, indexed=checkpoint.sharded)


def planned_contents(
    checkpoint: Checkpoint, decisions: Sequence[Decision], source: Stored, repaired: Sequence[str] = ()
) -> Contents:
    """Return what would be written, without data. repaired: names of tensors that may be."""
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
            specs = decision.format.factor_specs(layer.shape, decision.stored_type, decision.nonzeros)
            entry = entry_of(layer, decision.format, specs)
            packed[layer.name] = Packed(entry, decision.format.rebuild, pieces_of(layer.name, specs))
    return _contents(checkpoint, packed, decisions, source, dict.fromkeys(repaired))


def _contents(
    checkpoint: Checkpoint,
    packed: Mapping[str, Packed],
    decisions: Sequence[Decision],
    source: Stored,
    repaired: Mapping[str, Piece | None],
) -> Contents:
    """Put compressed layers, repaired tensors and untouched ones together, in the order of the source."""
    pieces: list[Piece] = []
    for name, info in checkpoint.items():
        if name in packed:
            pieces += packed[name].pieces
        elif name not in checkpoint.tied:
            untouched = Piece(name, info.dtype, info.shape, name, partial(checkpoint.raw, name))
            pieces.append(repaired.get(name) or untouched)
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
        repaired=tuple(sorted(repaired)),
    )
    # Loaders of the Hugging Face family ask for "format" before they read a file.
    loadable = {} if checkpoint.folder is None else {"format": "pt"}
    return Contents(pieces, {**loadable, **checkpoint.metadata}, manifest)


def _result(
    checkpoint: Checkpoint,
    source: Stored,
    decisions: Sequence[Decision],
    results: Sequence[LayerResult],
    output: Stored | int,
    notes: Sequence[str],
    started: float,
) -> CompressionResult:
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
