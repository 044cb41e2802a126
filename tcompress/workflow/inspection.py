"""inspect(): what is in a checkpoint, from its headers alone."""

from __future__ import annotations

from tcompress.checkpoint.layers import layer_of
from tcompress.checkpoint.manifest import METADATA_KEY, is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.workflow.decoding import view
from tcompress.workflow.results import Inspection, InspectionRow


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Describe a dense or compressed checkpoint. Raises InputError when a manifest contradicts the tensors."""
    compressed = is_compressed(checkpoint)
    return Inspection(
        path=checkpoint.path,
        files=tuple(path.name for path in checkpoint.files),
        file_bytes=sum(path.stat().st_size for path in checkpoint.files),
        rows=tuple(_compressed_rows(checkpoint) if compressed else _dense_rows(checkpoint)),
        metadata={key: value for key, value in checkpoint.metadata.items() if key != METADATA_KEY},
        manifest=_summary(checkpoint) if compressed else None,
        key=checkpoint.key,
        other_values=checkpoint.other_values,
    )


def _dense_rows(checkpoint: Checkpoint) -> list[InspectionRow]:
    rows = []
    for name, info in checkpoint.items():
        layer, tied_to = layer_of(info), checkpoint.tied.get(name)
        rows.append(
            InspectionRow(
                name=name,
                shape=info.shape,
                dtype=info.dtype.name,
                dense_bytes=info.nbytes,
                stored_bytes=0 if tied_to else info.nbytes,
                kind=None if layer is None else str(layer.kind),
                format=None,
                relative_error=None,
                tied_to=tied_to,
            )
        )
    return rows


def _compressed_rows(checkpoint: Checkpoint) -> list[InspectionRow]:
    dense = view(checkpoint)
    rows = []
    for name, info in dense.infos.items():
        entry, tied_to = dense.manifest.layers.get(name), dense.manifest.tied.get(name)
        layer = layer_of(info)
        stored = 0 if tied_to else info.nbytes if entry is None else dense.stored_bytes(name)
        rows.append(
            InspectionRow(
                name=name,
                shape=info.shape,
                dtype=info.dtype.name,
                dense_bytes=info.nbytes,
                stored_bytes=stored,
                kind=str(entry.kind) if entry else None if layer is None else str(layer.kind),
                format=None if entry is None else str(dense.setting(name)),
                relative_error=None if entry is None else entry.relative_error,
                tied_to=tied_to,
            )
        )
    return rows


def _summary(checkpoint: Checkpoint) -> dict[str, object]:
    manifest = view(checkpoint).manifest
    return {
        "writer": manifest.writer,
        "source": dict(manifest.source),
        "tied": dict(manifest.tied),
        "rebuild": dict(manifest.rebuild),
        "layers": len(manifest.layers),
    }
