"""Where a compressed model can be repaired without its layers changing: shifts, scales and statistics of channels.

Letters: y (positions, channels) = what a module gives in the compressed model, y0 = the same in the dense one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tcompress.checkpoint.reader import Checkpoint
from tcompress.workflow.matching import Place, places_in, without_prefix
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.tracing import Traced

Values = Mapping[str, Tensor]  # attribute of a module -> what it is to be

STATISTICS = ("running_mean", "running_var")
_NORMALISATIONS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TINY = 1e-12  # of a mean square: a variance below that part of it is rounding


@dataclass(frozen=True)
class Site:
    """A module that is called once, in both models. names: attribute -> its tensor's name in the checkpoint."""

    dense: nn.Module
    prefix: nn.Module
    names: Mapping[str, str]

    @property
    def has_statistics(self) -> bool:
        """Whether it normalises by statistics that the checkpoint holds."""
        return isinstance(self.prefix, _BatchNorm) and all(name in self.names for name in STATISTICS)

    def rows(self, x: Tensor) -> Tensor:
        """Return an input or output of the module as (positions, channels)."""
        module = self.prefix
        if isinstance(module, _BatchNorm | nn.GroupNorm):
            x = x.movedim(1, -1)
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            x = x.movedim(-1 - len(module.kernel_size), -1)
        return x.reshape(-1, x.shape[-1])

    def held(self, attribute: str) -> Tensor:
        """Return what the compressed model has, in float64."""
        return getattr(self.prefix, attribute).detach().double()  # type: ignore[no-any-return]

    def put(self, values: Values) -> Values:
        """Let the compressed model have these values; return those that it had."""
        had = {}
        with torch.no_grad():
            for attribute, value in values.items():
                held = getattr(self.prefix, attribute)
                had[attribute] = held.clone()
                held.copy_(value)
        return had


class _Reached(Exception):  # noqa: N818 - no error: it ends a run of the model where nothing more is needed
    """The module was reached."""


def find_sites(checkpoint: Checkpoint, models: Reconstruction) -> list[Site]:
    """Return the normalisations, linear layers and convolutions with something to repair, in forward order.

    That is a bias, a scale or statistics that the checkpoint holds in a floating type, and holds for nothing else.
    """
    names = without_prefix(checkpoint, models.strip_prefix, checkpoint.path)
    places = places_in(models.prefix.model)
    uses = Counter(place.identity for place in places.values())
    tied = {*checkpoint.tied, *checkpoint.tied.values()}
    found: dict[int, dict[str, str]] = {}
    owners: dict[int, Place] = {}
    for name, place in places.items():
        stored = names.get(name)
        if stored is None or stored in tied or uses[place.identity] > 1 or not checkpoint[stored].dtype.is_floating:
            continue
        if _is_repairable(place):
            found.setdefault(id(place.module), {})[place.attribute] = stored
            owners[id(place.module)] = place
    called = _called(models.prefix, [place.module for place in owners.values()], models.batches[0])
    return [
        Site(models.dense.model.get_submodule(owners[key].owner), owners[key].module, found[key])
        for key, times in called.items()
        if times == 1
    ]


def _is_repairable(place: Place) -> bool:
    module = place.module
    if isinstance(module, _BatchNorm):
        return place.attribute in {*STATISTICS, "weight", "bias"}
    if isinstance(module, nn.GroupNorm) or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1):
        return place.attribute in {"weight", "bias"}
    return isinstance(module, _LAYERS) and place.attribute == "bias"


def _called(traced: Traced, modules: Sequence[nn.Module], batch: Any) -> Counter[int]:
    """Return how often each module is called, in the order of the first calls."""
    calls: Counter[int] = Counter()

    def count(module: nn.Module, _: Any) -> None:
        calls[id(module)] += 1

    handles = [module.register_forward_pre_hook(count) for module in modules]
    try:
        traced.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def statistics(site: Site, traced: Traced, batches: Sequence[Any]) -> Values:
    """Return mean and variance of the input that a batch normalisation gets in the compressed model."""
    sums, count = torch.zeros(()), 0
    for batch in batches:
        x = site.rows(_at(traced, site.prefix, batch)[0]).double()
        found = torch.stack([x.sum(0), x.square().sum(0)])
        sums, count = found if count == 0 else sums + found, count + len(x)
    mean, square = sums / count
    return {"running_mean": mean, "running_var": (square - mean * mean).clamp_min(0)}


def least_squares(site: Site, models: Reconstruction, batches: Sequence[Any]) -> Values:
    """Return the bias, and the scale where the module has one, for which its outputs are nearest to the dense ones.

    Channel by channel: a y + c for y0, where a is cov(y, y0) / var(y), or 1 for a module without a scale.
    """
    sums, count = torch.zeros(()), 0
    for batch in batches:
        y = site.rows(_at(models.prefix, site.prefix, batch)[1]).double()
        y0 = site.rows(_at(models.dense, site.dense, batch)[1]).double()
        found = torch.stack([y.sum(0), y0.sum(0), (y * y).sum(0), (y * y0).sum(0)])
        sums, count = found if count == 0 else sums + found, count + len(y)
    mean, mean0, square, product = sums / count
    variance, covariance = square - mean * mean, product - mean * mean0
    known = variance > _TINY * square
    scales = "weight" in site.names and isinstance(site.prefix, _NORMALISATIONS)
    a = torch.where(known, covariance / variance, 1.0) if scales else torch.ones_like(mean)
    values = {}
    if scales:
        values["weight"] = a * site.held("weight")
    if "bias" in site.names:
        values["bias"] = a * (site.held("bias") - mean) + mean0
    return values


def _at(traced: Traced, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return what the module gets and gives, and do not run the model further than there."""
    found: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any], output: Tensor) -> None:
        found.append(((arguments or tuple(named.values()))[0].detach(), output.detach()))
        raise _Reached

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        traced.run(batch, until=_Reached)
    finally:
        handle.remove()
    return found[0]
