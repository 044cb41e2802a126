"""inspect(): what is in a checkpoint, from its headers alone."""

from __future__ import annotations

from dataclasses import replace

from tcompress.checkpoint.layers import layer_of
from tcompress.checkpoint.manifest import METADATA_KEY, Manifest, is_compressed
from tcompress.checkpoint.reader import Checkpoint, TensorInfo
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.results import Inspection, InspectionRow


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe a dense or compressed checkpoint. Raises InputError when a manifest contradicts the tensors."""
    compressed = view(checkpoint) if is_compressed(checkpoint) else None
    infos = checkpoint if compressed is None else compressed.infos
    tied = checkpoint.tied if compressed is None else compressed.manifest.tied
    return Inspection(
        path=checkpoint.path,
        files=tuple(path.name for path in checkpoint.files),
        file_bytes=sum(path.stat().st_size for path in checkpoint.files),
        rows=tuple(_row(info, tied.get(name), compressed) for name, info in infos.items()),
        metadata={key: value for key, value in checkpoint.metadata.items() if key != METADATA_KEY},
        manifest=None if compressed is None else _summary(compressed.manifest),
        key=checkpoint.key,
        other_values=checkpoint.other_values,
    )


def _row(info: TensorInfo, tied_to: str | None, compressed: CompressedView | None) -> InspectionRow:
    layer = layer_of(info)
    entry = None if compressed is None else compressed.manifest.layers.get(info.name)
    row = InspectionRow(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype.name,
        dense_bytes=info.nbytes,
        stored_bytes=0 if tied_to else info.nbytes,
        kind=None if layer is None else str(layer.kind),
        setting=None,
        store=None,
        relative_error=None,
        tied_to=tied_to,
    )
    if compressed is None or entry is None:
        return row
    return replace(
        row,
        stored_bytes=compressed.stored_bytes(info.name),
        kind=str(entry.kind),
        setting=compressed.setting(info.name),
        store=compressed.stored_type(info.name),
        relative_error=entry.relative_error,
    )


def _summary(manifest: Manifest) -> dict[str, object]:
    return {
        "writer": manifest.writer,
        "source": dict(manifest.source),
        "tied": dict(manifest.tied),
        "rebuild": dict(manifest.rebuild),
        "layers": len(manifest.layers),
        "repaired": list(manifest.repaired),
    }
