"""Places in a model that wait for compressed layers while somebody else loads the rest of it.

A vacant layer is the module that it was, but its weight is no parameter any more: a plain tensor on the meta device
stands in for it. So no loader misses the weight, makes one up, allocates or casts it, while shapes can still be asked
for and weights can still be tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from tcompress.errors import InputError, listed
from tcompress.runtime.install import obstacle, put
from tcompress.runtime.modules import Factorized
from tcompress.workflow.loading import install
from tcompress.workflow.matching import Place
from tcompress.workflow.reading import LayerParts

_BYTES = "_compressed_bytes"


@dataclass(frozen=True)
class Vacancy:
    """One tensor under all names that the model has for it. stored: the layer's name in the file, none of a tie."""

    stored: str
    places: Mapping[str, Place]
    dtype: torch.dtype

    @property
    def learns(self) -> bool:
        """Whether gradients were recorded for the weight."""
        return any(place.learns for place in self.places.values())


def vacate(vacancy: Vacancy, nbytes: int = 0) -> None:
    """Take the weight out of its modules. nbytes: what a planner of memory is to count in place of it."""
    for place in vacancy.places.values():
        if place.attribute not in place.module._parameters:
            continue  # the same module under another name
        del place.module._parameters[place.attribute]
        stand_in = torch.empty(place.shape, dtype=vacancy.dtype, device="meta")
        stand_in._is_hf_initialized = True  # type: ignore[attr-defined]  # for loaders that fill what they do not find
        setattr(place.module, place.attribute, stand_in)
        if nbytes:
            counted = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            place.module.register_buffer(_BYTES, counted, persistent=False)
            nbytes = 0


def occupy(
    model: nn.Module, vacancy: Vacancy, layer: LayerParts, cache: str, devices: Mapping[str, torch.device]
) -> None:
    """Put a layer in its places; a dense weight where one of them has no factorised form."""
    homes = []
    for name, place in vacancy.places.items():
        place.module._buffers.pop(_BYTES, None)
        place.module._non_persistent_buffers_set.discard(_BYTES)
        like = torch.empty(0, dtype=vacancy.dtype, device=devices[name])
        held = nn.Parameter(like, requires_grad=vacancy.learns)
        homes.append(Place(place.owner, place.module, place.attribute, held))
    if any(obstacle(place.module, place.attribute) for place in homes):
        weight = layer.dense().to(vacancy.dtype).to(homes[0].device)
        set_dense(homes, nn.Parameter(weight, requires_grad=vacancy.learns))
        return
    install(model, homes, layer, cache)
    for home in homes:
        model.get_submodule(home.owner).to(home.device)


def set_dense(homes: Sequence[Place], weight: nn.Parameter) -> None:
    """Give vacant modules a weight again."""
    for place in homes:
        place.module.__dict__.pop(place.attribute, None)
        place.module.register_parameter(place.attribute, weight)


def dense_again(model: nn.Module, vacancy: Vacancy, dtype: torch.dtype | None) -> None:
    """Put the modules that a layer replaced back, with its dense weight; dtype None keeps that of the layer."""
    weight: nn.Parameter | None = None
    for place in vacancy.places.values():
        layer = model.get_submodule(place.owner)
        if not isinstance(layer, Factorized):
            continue
        if weight is None:
            values: Tensor = layer.weight.detach().to(dtype or layer.like.dtype, copy=True)
            weight = nn.Parameter(values, requires_grad=vacancy.learns)
        set_dense([place], weight)
        if layer.bias is not None:
            place.module.register_parameter("bias", layer.bias)
        put(model, place.owner, place.module.train(layer.training))


def require_complete(model: nn.Module, vacancies: Sequence[Vacancy], path: Path) -> None:
    """Raise InputError where a layer is not in its place, or anything in the model has no data."""
    empty = [name for name, held in chain(model.named_parameters(), model.named_buffers()) if held.is_meta]
    for vacancy in vacancies:
        for name, place in vacancy.places.items():
            layer = model.get_submodule(place.owner)
            if not isinstance(layer, Factorized) and layer._parameters.get(place.attribute) is None:
                empty.append(name)
    if empty:
        raise InputError(f"was loaded into {type(model).__name__}, which still lacks {listed(empty)}", path=path)
