"""save_compressed(): a torch model with factorised layers back into a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint import shards
from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.checkpoint.manifest import Entry, Factor, Manifest, figure, shared_stem
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.shards import Contents, Layout
from tcompress.checkpoint.writer import Piece
from tcompress.errors import NumericalError, UsageError
from tcompress.formats.grouped import GroupFormat
from tcompress.linalg.distance import compare
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import Packed, stored_in
from tcompress.runtime.ways import dense_weight
from tcompress.version import __version__
from tcompress.workflow.fitting import encoded
from tcompress.workflow.layout import described, entry_of, stored_name
from tcompress.workflow.matching import Place, places_in
from tcompress.workflow.reading import fingerprint_of
from tcompress.workflow.results import Stored, measure
from tcompress.workflow.settings import STORED_TYPES
from tcompress.workflow.stored import StoredFactor


def save_compressed(
    model: nn.Module, out: Path | str, *, against: Checkpoint | None = None, force: bool = False
) -> Stored:
    """Write a model to a compressed safetensors file: its factorised layers as factors, everything else as it is.

    against: the dense checkpoint it was made from. With it the errors of layers whose factors were changed, by training
    for instance, are measured anew; without it the file says that theirs are not known. Layers that were not changed
    keep what the file they came from said of them, and tensors that it called repaired are called so again. force:
    replace a file that exists.

    Returns what lies on disk. Raises UsageError for a model without factorised layers or a name without the suffix,
    NumericalError when a factor is not finite, OutputError when the file exists or cannot be written.
    """
    out = Path(out)
    if out.suffix != SAFETENSORS_SUFFIX:
        raise UsageError(
            f"compressed checkpoints are safetensors files; end the name with {SAFETENSORS_SUFFIX}", path=out
        )
    places = places_in(model)
    if not any(isinstance(place.held, Factorized) for place in places.values()):
        raise UsageError("the model has no factorised layers; load_into() makes them", path=out)
    output = Output(out, is_folder=False, force=force, inputs=list(against.files) if against is not None else [])
    output.check()
    contents = contents_of(places, against)
    with output:
        output.require_space(sum(piece.nbytes for piece in contents.pieces))
        shards.write(output.draft, contents, Layout(None))
        output.commit()
    return measure(out, is_folder=False)


def contents_of(places: Mapping[str, Place], against: Checkpoint | None) -> Contents:
    """Return what a compressed checkpoint of these places holds, by their names. Raises as ``save_compressed``."""
    first: dict[int, str] = {}
    tied = {name: one for name, place in places.items() if (one := first.setdefault(place.identity, name)) != name}
    pieces: list[Piece] = []
    entries: dict[str, Entry] = {}
    shared: dict[str, dict[str, Factor]] = {}
    of_group: dict[str, Mapping[str, StoredFactor]] = {}
    rebuild: dict[str, str] = {}
    source: dict[str, Any] = {}
    repaired: set[str] = set()
    for name, place in places.items():
        if name in tied:
            continue
        if isinstance(place.held, Tensor):
            pieces.append(_piece(name, place.held.detach(), name))
            continue
        layer = place.held
        stored = _stored(name, layer)
        own, common = _apart(layer, stored)
        group = layer.origin.group if layer.origin is not None else None
        if group is not None and group not in shared:
            pieces += _pieces(shared_stem(group), common, shared_stem(group))
            shared[group] = described({factor: held.spec for factor, held in common.items()})
            of_group[group] = common
        elif group is not None:
            _require_shared(name, common, of_group[group])
        pieces += _pieces(name, own, name if group is None else shared_stem(group))
        entries[name] = _entry(name, layer, own, against)
        rebuild[layer.setting.name] = layer.setting.rebuild
        if layer.origin is not None:
            source = dict(layer.origin.source)
            repaired |= {tied.get(each, each) for each in layer.origin.repaired}
    # Of those, what is still a plain tensor of the model: no compressed layer has a piece of its own name.
    kept = tuple(sorted(repaired & {piece.name for piece in pieces}))
    manifest = Manifest(f"tcompress {__version__}", source, tied, rebuild, entries, shared, kept)
    return Contents(pieces, {"format": "pt"}, manifest)


def _stored(name: str, layer: Factorized) -> dict[str, StoredFactor]:
    """Encode every factor of a layer as it was, in the fewest bytes."""
    found = {}
    for factor, held in stored_in(layer.factors).items():
        values = (held() if isinstance(held, Packed) else held).detach().cpu()
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"its factor {factor} is not finite; a smaller learning rate may keep it so", tensor=name
            )
        is_sparse = isinstance(held, Packed) and bool(held.coding.support.part_names)
        found[factor] = encoded(values, type_of(held), is_sparse=is_sparse)
        if isinstance(held, Packed) and held.coding.values is not None and held.coding == found[factor].coding:
            # Other codes may stand for the same values: these are the ones that were read.
            found[factor] = replace(found[factor], parts={part: t.cpu() for part, t in held.parts().items()})
    return found


def type_of(held: nn.Parameter | Packed) -> torch.dtype:
    """Return the type that a factor is stored in; codes have one of their own."""
    if not isinstance(held, Packed):
        return held.dtype
    name = held.coding.values
    return held().dtype if name is None else STORED_TYPES[name]


def _apart(
    layer: Factorized, stored: Mapping[str, StoredFactor]
) -> tuple[dict[str, StoredFactor], dict[str, StoredFactor]]:
    """Return a layer's own factors, and those that it shares with its group."""
    if not isinstance(layer.setting, GroupFormat) or layer.origin is None or layer.origin.group is None:
        return dict(stored), {}
    names = layer.setting.group_specs(layer.factors.shape, torch.float32, 1)[0]
    return (
        {name: held for name, held in stored.items() if name not in names},
        {name: held for name, held in stored.items() if name in names},
    )


def _require_shared(name: str, common: Mapping[str, StoredFactor], written: Mapping[str, StoredFactor]) -> None:
    """Raise UsageError where a layer no longer has the factors that its group shares, which are written once."""
    for factor, held in common.items():
        if factor not in written or not torch.equal(held.values, written[factor].values):
            problem = f"its factor {factor} is no longer the one that it shares with the other layers of its group"
            raise UsageError(problem, tensor=name)


def _entry(name: str, layer: Factorized, own: Mapping[str, StoredFactor], against: Checkpoint | None) -> Entry:
    origin = layer.origin
    dtype = BY_TORCH[layer.like.dtype if origin is None else origin.stored_as]
    kind = LayerKind(origin.kind) if origin is not None else LayerKind.LINEAR
    norm, error = _figures(name, layer, against)
    described_as = Layer(name, kind, layer.factors.shape, dtype)
    specs = {factor: held.spec for factor, held in own.items()}
    group = None if origin is None else origin.group
    return entry_of(described_as, layer.setting, specs, norm=norm, relative_error=error, group=group)


def _figures(name: str, layer: Factorized, against: Checkpoint | None) -> tuple[float, float | None]:
    """Return the norm of the weight and the error of the factors; None for an error that cannot be known."""
    origin = layer.origin
    if origin is not None and fingerprint_of(stored_in(layer.factors)) == origin.fingerprint:
        return origin.norm, origin.relative_error
    if against is not None and name in against and against[name].shape == layer.factors.shape:
        stored_as = layer.like.dtype if origin is None else origin.stored_as
        with torch.no_grad():
            norm, error = compare(against.read(name), dense_weight(layer.factors, stored_as, stored_as).cpu())
        return figure(norm), figure(error)
    return (0.0 if origin is None else origin.norm), None


def _pieces(stem: str, stored: Mapping[str, StoredFactor], together: str) -> Sequence[Piece]:
    return [
        _piece(stored_name(stem, factor, part), tensor, together)
        for factor, held in stored.items()
        for part, tensor in held.parts.items()
    ]


def _piece(name: str, tensor: Tensor, group: str) -> Piece:
    return Piece(name, BY_TORCH[tensor.dtype], tuple(tensor.shape), group, partial(_bytes, tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return bytes_of(tensor.cpu())
