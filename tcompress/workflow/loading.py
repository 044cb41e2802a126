"""load_into(): a compressed checkpoint into a torch model, without its dense weights; load_state_dict(): with them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from tcompress.checkpoint.integrity import require_whole
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import InputError, UsageError
from tcompress.runtime.install import factorized, obstacle, put
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import assemble
from tcompress.runtime.ways import check_cache
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.matching import Place, homes_of, places_in, require_fit, without_prefix
from tcompress.workflow.reading import LayerParts, read_layers

Source = Path | str | Checkpoint
_CPU = torch.device("cpu")


def load_into(model: nn.Module, source: Source, *, strip_prefix: str = "", cache: str = "auto") -> nn.Module:
    """Replace the layers of a model by those of a compressed checkpoint, load its dense rest, and return the model.

    source: a file, a folder, or an opened checkpoint. strip_prefix: what the names in the file begin with and those in
    the model do not, such as ``module.``. cache: ``auto``, ``always`` or ``never``, see ``Factorized``.

    Parameters on the ``meta`` device get their data on the CPU; a dense weight is allocated for none of the replaced
    layers. Layers keep their types, devices, ``requires_grad`` and ties. A layer that has no factorised form is loaded
    dense, with a warning. A model that is a single layer is not changed: what is returned takes its place.

    Raises InputError, before the model is touched, when the file is damaged, or its names and shapes are not those of
    the model; UnsupportedError for formats that this version does not know.
    """
    check_cache(cache)
    with _opened(source) as checkpoint:
        dense = view(checkpoint)
        require_whole(checkpoint)
        names = without_prefix(dense.infos, strip_prefix, checkpoint.path)
        places = places_in(model)
        require_fit(model, places, {name: dense.infos[stored].shape for name, stored in names.items()}, checkpoint.path)
        repaired = set(dense.manifest.repaired)
        layers = read_layers(dense, [name for name, stored in names.items() if stored in repaired])
        homes = homes_of(names, places)
        _require_equal_ties(dense, names, homes, layers)
        once = {homes[name][0].identity: name for name in reversed(names)}
        firsts = {name: dense.manifest.tied.get(names[name], names[name]) for name in reversed(once.values())}
        problems = {name: next(filter(None, map(_obstacle, homes[name])), None) for name in firsts}
        factored = [name for name, first in firsts.items() if first in layers and problems[name] is None]
        _require_dense_homes(firsts.keys() - set(factored), homes, checkpoint)
        for name, first in firsts.items():  # before the layers, which take the biases that they find
            if first not in layers:
                _fill(homes[name], checkpoint.read(first))
            elif name not in factored:
                warnings.warn(f"{name} is loaded dense: {problems[name]}", stacklevel=2)
                _fill(homes[name], layers[first].dense())
        used: set[str] = set()
        for name in factored:
            first = firsts[name]
            layer = layers[first].copied() if first in used else layers[first]  # tied in the file, not in the model
            model = install(model, homes[name], layer, cache)
            used.add(first)
        return model


def load_state_dict(source: Source, model: nn.Module | None = None, *, strip_prefix: str = "") -> dict[str, Tensor]:
    """Return the dense tensors of a checkpoint, compressed or not, by their names without the prefix.

    model: is given them, one at a time, if there is one, its names and shapes checked as by ``load_into``; what is
    returned are its own tensors. Raises as ``load_into``, and UsageError for a model with factorised layers.
    """
    with _opened(source) as checkpoint:
        dense = view(checkpoint) if is_compressed(checkpoint) else None
        require_whole(checkpoint)
        infos = checkpoint if dense is None else dense.infos
        names = without_prefix(infos, strip_prefix, checkpoint.path)
        places = {} if model is None else places_in(model)
        if any(isinstance(place.held, Factorized) for place in places.values()):
            raise UsageError("the model has factorised layers; dense tensors need a model as it was built")
        if model is not None:
            require_fit(model, places, {name: infos[stored].shape for name, stored in names.items()}, checkpoint.path)
        homes = {} if model is None else homes_of(names, places)
        found = {}
        for name, stored in names.items():
            tensor = checkpoint.read(stored) if dense is None else dense.read(stored, _CPU)
            if model is None:
                found[name] = tensor.clone()  # what was read may lie in the mapped file
            else:
                _fill(homes[name], tensor)
        if model is not None:
            filled = {name: place.held for name, place in places_in(model).items() if name in names}
            found = {name: held.detach() for name, held in filled.items() if isinstance(held, Tensor)}
        return found


@contextmanager
def _opened(source: Source) -> Iterator[Checkpoint]:
    """Open a path and close it again; an opened checkpoint stays open."""
    if isinstance(source, Checkpoint):
        yield source
        return
    with open_checkpoint(Path(source)) as checkpoint:
        yield checkpoint


def install(model: nn.Module, homes: Sequence[Place], layer: LayerParts, cache: str) -> nn.Module:
    """Put a layer in all of its places: a module that is in several stays one, and tied ones share their factors."""
    new: dict[int, Factorized] = {}
    for place in homes:
        if id(place.module) not in new:
            new[id(place.module)] = replacement(place, layer, cache)
        if not place.owner:
            return new[id(place.module)]
        put(model, place.owner, new[id(place.module)])
    return model


def replacement(place: Place, layer: LayerParts, cache: str) -> Factorized:
    """Return the factorised layer for a place, on the device of what it held, or the CPU for the meta device."""
    device = _CPU if place.device.type == "meta" else place.device
    for factor in layer.held.values():
        factor.requires_grad_(place.learns)
    factors = assemble(layer.setting, layer.shape, layer.held, place.dtype)
    like = torch.empty(0, dtype=place.dtype, device=device)
    found = factorized(place.module, factors, layer.setting, like=like, cache=cache, origin=layer.origin)
    found.factors.to(device)
    return found


def _obstacle(place: Place) -> str | None:
    return None if isinstance(place.held, Factorized) else obstacle(place.module, place.attribute)


def _require_equal_ties(
    dense: CompressedView,
    names: Mapping[str, str],
    homes: Mapping[str, Sequence[Place]],
    layers: Mapping[str, LayerParts],
) -> None:
    """Raise InputError where the model has one tensor and the file holds two that differ."""
    first: dict[int, str] = {}
    for name, stored in names.items():
        other = first.setdefault(homes[name][0].identity, stored)
        one, two = (dense.manifest.tied.get(each, each) for each in (other, stored))
        if one != two and not _are_equal(dense, one, two, layers):
            problem = f"differs from {other}, and the model has one tensor for both"
            raise InputError(problem, path=dense.checkpoint.path, tensor=stored)


def _require_dense_homes(names: Collection[str], homes: Mapping[str, Sequence[Place]], checkpoint: Checkpoint) -> None:
    """Raise InputError where dense values would have to go into a factorised layer."""
    for name in sorted(names):
        if any(isinstance(place.held, Factorized) for place in homes[name]):
            problem = f"{name} is dense, and the model has a factorised layer there; build the model anew"
            raise InputError(problem, path=checkpoint.path)


def _are_equal(dense: CompressedView, one: str, two: str, layers: Mapping[str, LayerParts]) -> bool:
    if one in layers and two in layers:
        return layers[one].origin.fingerprint == layers[two].origin.fingerprint
    return one not in layers and two not in layers and torch.equal(dense.read(one, _CPU), dense.read(two, _CPU))


def _fill(homes: Sequence[Place], tensor: Tensor) -> None:
    """Put dense values where a tensor is; in place of one on the meta device comes a new one, under all its names."""
    held = homes[0].held
    assert not isinstance(held, Factorized), "checked before"  # noqa: S101
    if not held.is_meta:
        with torch.no_grad():
            held.copy_(tensor)
        return
    new: Tensor = tensor.to(held.dtype, copy=True)
    if isinstance(held, nn.Parameter):
        new = nn.Parameter(new, requires_grad=held.requires_grad)
    for place in homes:
        setattr(place.module, place.attribute, new)
