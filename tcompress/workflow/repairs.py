"""Repairs once all layers are as they are stored: no labels, no gradients, and nothing that is not seen to help.

Two kinds: the statistics of all batch normalisations, measured in the compressed model; and, one module after the
other, the bias (of a normalisation also the scale) for which its outputs are nearest to the dense model's. Each
is found on some of the calibration batches, and kept only where on the others, which it has not seen, the compressed
model's outputs come nearer to the dense model's.

M. Nagel et al., "Data-free quantization through weight equalization and bias correction", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.journal import Journal
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.writer import Piece
from tcompress.workflow.progress import Progress, Step, silent
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.repair_sites import STATISTICS, Site, Values, find_sites, least_squares, statistics
from tcompress.workflow.results import Repairs
from tcompress.workflow.samples import first_samples, outputs_in, samples_in, tensors_in

_EVERY = 4  # of so many calibration batches one is held out
_ENOUGH = 256  # samples to find a repair on, and to judge it on
_STEPS = (1.0, 0.5)  # how far statistics are moved towards those that were measured
_WORTH = 5e-4  # of the squared distance: what a repair must gain to be worth its names in the file
_ROOM = 1 << 26  # values of the dense model's outputs that are kept
_KEY = "repairs"


def repairs(
    checkpoint: Checkpoint, models: Reconstruction, journal: Journal, progress: Progress = silent
) -> tuple[dict[str, Piece], Repairs]:
    """Return the tensors that are written with other values, and what is to be told of them.

    The prefix of ``models`` must hold every layer as it is stored; it has the dense model's other tensors again when
    this is done. A run that was stopped takes what the journal has.
    """
    if _KEY not in journal:
        found, tensors = _repaired(checkpoint, models, progress)
        journal.put(_KEY, found, [(name, tensor, name) for name, tensor in tensors.items()])
    record = journal[_KEY]
    pieces = {piece.name: piece for piece in record.pieces}
    return pieces, Repairs(names=tuple(pieces), **record.found)


def may_change(checkpoint: Checkpoint, models: Reconstruction | None) -> list[str]:
    """Return tensors that may be repaired together: no others that may be take more bytes to name."""
    if models is None or not models.repair:
        return []
    found = find_sites(checkpoint, models)
    return [
        name
        for site in found
        for attribute, name in site.names.items()
        if not site.has_statistics or attribute in STATISTICS
    ]


def _repaired(
    checkpoint: Checkpoint, models: Reconstruction, progress: Progress
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Repair the prefix for a while; return what is to be told, and every tensor that became another."""
    sites = find_sites(checkpoint, models)
    seen, held_out = _apart(models.batches)
    told: dict[str, Any] = {"modules": len(sites), "held_out": sum(map(samples_in, held_out))}
    if not sites or not held_out:
        return {**told, "before": None, "after": None}, {}
    judge = _Judge(checkpoint, models, held_out)
    before = judge.distance
    kept = _judge_statistics(judge, [site for site in sites if site.has_statistics], seen)
    left = [site for site in sites if not (kept and site.has_statistics)]
    for position, site in enumerate(left, start=1):
        name = next(iter(site.names.values())).rpartition(".")[0]
        progress(Step("repairing", position, len(left), name, position - 1, len(left)))
        judge.keeps([(site, least_squares(site, models, seen))])
    progress(Step("repairing", len(left), len(left), "", len(left), len(left)))
    told |= {"before": _finite_root(before), "after": _finite_root(judge.distance)}
    changed = dict(_changed(checkpoint, sites))
    for site in sites:
        site.put({attribute: getattr(site.dense, attribute) for attribute in site.names})
    return told, changed


def _finite_root(distance: float) -> float | None:
    return math.sqrt(distance) if math.isfinite(distance) else None


def _judge_statistics(judge: _Judge, sites: Sequence[Site], batches: Sequence[Any]) -> bool:
    """Measure the statistics of all sites, each behind those that have theirs; keep them, or half of the way, or none.

    Together, because the error of one alone is what the statistics behind it would make good. Returns whether they are
    kept: a module has one repair, so that the bytes of the names are known before.
    """
    found: list[tuple[Site, Values, Values]] = []
    for site in sites:
        new = statistics(site, judge.models.prefix, batches)
        found.append((site, site.put(judge.rounded(site, new)), new))
    for site, had, _ in found:
        site.put(had)
    return bool(found) and any(judge.keeps([_moved(*each, step) for each in found]) for step in _STEPS)


def _moved(site: Site, had: Values, new: Values, step: float) -> tuple[Site, Values]:
    return site, {name: torch.lerp(had[name].double(), new[name], step) for name in new}


class _Judge:
    """Says whether the compressed model's outputs come nearer to the dense ones.

    distance: squared, over the squared size of the dense outputs.
    """

    def __init__(self, checkpoint: Checkpoint, models: Reconstruction, batches: Sequence[Any]) -> None:
        self.models = models
        self._checkpoint = checkpoint
        self._batches = batches
        self._dense: dict[int, list[Tensor]] = {}
        self._room = _ROOM
        self.distance = self._measured()

    def keeps(self, changes: Sequence[tuple[Site, Values]]) -> bool:
        """Try these values; take them back unless the distance falls."""
        rounded = [(site, self.rounded(site, values)) for site, values in changes]
        if not all(bool(torch.isfinite(value).all()) for _, values in rounded for value in values.values()):
            return False
        had = [(site, site.put(values)) for site, values in rounded]
        distance = self._measured()
        if distance < (1 - _WORTH) * self.distance:
            self.distance = distance
            return True
        for site, values in had:
            site.put(values)
        return False

    def rounded(self, site: Site, values: Values) -> dict[str, Tensor]:
        """Return values as the checkpoint will hold them."""
        types = {name: self._checkpoint[site.names[name]].dtype.torch for name in values}
        return {name: value.to(types[name]) for name, value in values.items()}

    def _measured(self) -> float:
        apart = size = 0.0
        for at, batch in enumerate(self._batches):
            for was, now in zip(self._wanted(at), outputs_in(self.models.prefix.run(batch)), strict=True):
                apart += float((was - now).square().sum(dtype=torch.float64))
                size += float(was.square().sum(dtype=torch.float64))
        distance = apart / size if size else apart
        return distance if math.isfinite(distance) else math.inf

    def _wanted(self, at: int) -> list[Tensor]:
        """Return the dense model's outputs, which are kept while there is room."""
        if at in self._dense:
            return self._dense[at]
        found = outputs_in(self.models.dense.run(self._batches[at]))
        values = sum(tensor.numel() for tensor in found)
        if values <= self._room:
            self._dense[at] = found
            self._room -= values
        return found


def _changed(checkpoint: Checkpoint, sites: Sequence[Site]) -> Iterator[tuple[str, Tensor]]:
    for site in sites:
        for attribute, name in site.names.items():
            was = checkpoint.read(name)
            now = getattr(site.prefix, attribute).detach().to("cpu", was.dtype, copy=True)
            held = getattr(site.dense, attribute).detach().to("cpu", was.dtype)
            if not torch.equal(now, held):  # not ``was``: a model of another type may hold it rounded
                yield name, now


def _apart(batches: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Return batches to find repairs on and others to judge them by; none where there is but one sample."""
    if len(batches) == 1:
        return _rows_apart(batches[0])
    every = min(_EVERY, len(batches))
    seen = [batch for at, batch in enumerate(batches, start=1) if at % every]
    return first_samples(seen, _ENOUGH), first_samples(batches[every - 1 :: every], _ENOUGH)


def _rows_apart(batch: Any) -> tuple[list[Any], list[Any]]:
    """Part a batch by its samples, if all of its tensors have as many."""
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors_in(batch)}
    count = min(counts, default=0)
    if len(counts) != 1 or count < _EVERY:
        return [], []
    held_out = torch.arange(count) % _EVERY == _EVERY - 1
    return [_taken(batch, ~held_out)], [_taken(batch, held_out)]


def _taken(batch: Any, mask: Tensor) -> Any:
    match batch:
        case Tensor():
            return batch[mask.to(batch.device)]
        case Mapping():
            return {name: _taken(value, mask) for name, value in batch.items()}
        case tuple() | list():
            return type(batch)(_taken(value, mask) for value in batch)
    return batch
