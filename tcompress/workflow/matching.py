"""The names and shapes of a file beside those of a torch model: everything that does not fit, in one message."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from tcompress.errors import InputError
from tcompress.runtime.modules import Factorized

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where a tensor lives in a model. attribute: of the module, which is named by ``owner``; held: what is there."""

    owner: str
    module: nn.Module
    attribute: str
    held: Tensor | Factorized

    @property
    def shape(self) -> Shape:
        """Shape of the dense tensor."""
        return self.held.factors.shape if isinstance(self.held, Factorized) else tuple(self.held.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Type that the layer computes in."""
        return self._like.dtype

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self._like.device

    @property
    def learns(self) -> bool:
        """Whether gradients are recorded for it."""
        if isinstance(self.held, Factorized):
            return any(parameter.requires_grad for parameter in self.held.factors.parameters())
        return self.held.requires_grad

    @property
    def _like(self) -> Tensor:
        return self.held.like if isinstance(self.held, Factorized) else self.held

    @property
    def identity(self) -> int:
        """The same for all names of a tensor that the model shares between them."""
        if isinstance(self.held, Factorized):
            return id(next(chain(self.held.factors.parameters(), self.held.factors.buffers())))
        return id(self.held)


def places_in(model: nn.Module) -> dict[str, Place]:
    """Return the place of every tensor that belongs to a model's state dict, by its dense name."""
    found: dict[str, Place] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        if _is_inside(owner, found):
            continue
        for attribute, held in _tensors_of(module):
            name = f"{owner}.{attribute}" if owner else attribute
            found[name] = Place(owner, module, attribute, held)
    return found


def homes_of(names: Iterable[str], places: Mapping[str, Place]) -> dict[str, list[Place]]:
    """Return for each name all places of its tensor, which are several where the model ties it."""
    together: dict[int, list[Place]] = {}
    for place in places.values():
        together.setdefault(place.identity, []).append(place)
    return {name: together[places[name].identity] for name in names}


def _is_inside(owner: str, found: Mapping[str, Place]) -> bool:
    """Tell whether a module is a part of a factorised layer, whose tensors are no dense ones."""
    parents = owner.split(".")
    names = (".".join([*parents[:end], "weight"]) for end in range(len(parents)))
    return any(name in found and isinstance(found[name].held, Factorized) for name in names)


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor | Factorized]]:
    if isinstance(module, Factorized):
        yield "weight", module
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield attribute, parameter
    for attribute, buffer in module._buffers.items():
        if buffer is not None and attribute not in module._non_persistent_buffers_set:
            yield attribute, buffer


def without_prefix(names: Collection[str], prefix: str, path: Path) -> dict[str, str]:
    """Return each name without the prefix -> the name. Raises InputError when one does not begin with it."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    others = [name for name in names if not name.startswith(prefix)]
    if others:
        raise InputError(f"its tensor {others[0]} does not begin with {prefix!r}, which is to be left out", path=path)
    return {name.removeprefix(prefix): name for name in names}


def require_fit(model: nn.Module, places: Mapping[str, Place], shapes: Mapping[str, Shape], path: Path) -> None:
    """Raise InputError with all that is missing, unexpected or of another shape; the model is not touched."""
    given = {places[name].identity for name in shapes if name in places}
    missing = [name for name, place in places.items() if name not in shapes and place.identity not in given]
    unexpected = [name for name in shapes if name not in places]
    other = [
        f"{name} ({_sizes(shape)} in the file, {_sizes(places[name].shape)} in the model)"
        for name, shape in shapes.items()
        if name in places and places[name].shape != shape
    ]
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", other))
        if names
    ]
    if problems:
        advice = _prefix_advice(places, shapes) if missing and unexpected else ""
        raise InputError(f"does not fit the model {type(model).__name__}; {'; '.join(problems)}{advice}", path=path)
    lost = [
        f"{owner}.{attribute}" if owner else attribute
        for owner, module in model.named_modules()
        for attribute in module._non_persistent_buffers_set
        if not isinstance(module, Factorized) and (buffer := module._buffers.get(attribute)) is not None
        if buffer.is_meta
    ]
    if lost:
        raise InputError(
            f"does not hold {', '.join(lost)}, which the model has on the meta device; build it so that only "
            "parameters are there, or on the CPU",
            path=path,
        )


def _prefix_advice(places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> str:
    """Return the prefix that would make the names fit, where there is one."""
    for prefix in sorted({name[: end + 1] for name in shapes for end in range(len(name)) if name[end] == "."}):
        if all(name.startswith(prefix) for name in shapes) and any(n.removeprefix(prefix) in places for n in shapes):
            return f"; with strip_prefix={prefix!r} names would fit"
    heads = {name.split(".", 1)[0] for name in places}
    if len(heads) == 1 and all(f"{min(heads)}.{name}" in places for name in shapes):
        return f"; the file fits the model's part {min(heads)!r}"
    return ""


def _sizes(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
