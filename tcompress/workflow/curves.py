"""What a layer loses at which bytes: candidates over formats, settings and stored types, fitted and stored for real.

What cannot be worth a fit is told by decompositions of the weight alone (``prospects``); between two settings that were
fitted others are interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer
from tcompress.encodings import INT3, INT4
from tcompress.formats import FORMATS, Format
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.metric import PLAIN, Metric
from tcompress.formats.sparse import Sparse
from tcompress.workflow.allocation import Point, hull
from tcompress.workflow.fitting import working_copy
from tcompress.workflow.layout import planned_bytes
from tcompress.workflow.prospects import Prospects, within
from tcompress.workflow.rank_multiples import rounded
from tcompress.workflow.trial import Candidate, Trial

_AMOUNTS = (0.55, 0.25, 0.1, 0.035)  # of a layer's elements that factors may have
_SLACK = (0.95, 1.2)  # times the loss that others reach; the second where outlooks see the sizes of inputs alone
_BETWEEN = 4  # settings interpolated between two that were fitted


def default_formats() -> list[type[Format]]:
    """Return the formats that are tried unasked: those of one layer each that are fitted in seconds."""
    return [kind for kind in FORMATS.values() if kind.quick and not issubclass(kind, GroupFormat)]


def default_types(layer: Layer) -> list[torch.dtype]:
    """Return the types that factors are tried in: codes, two bytes, the layer's own."""
    own = layer.dtype.torch
    assert own is not None, "layers are of floating types"  # noqa: S101
    half = torch.bfloat16 if own == torch.bfloat16 else torch.float16
    return list(dict.fromkeys([INT3, INT4, torch.int8, half, own]))


def curve_of(
    layer: Layer,
    weight: Tensor,
    formats: Sequence[type[Format]],
    types: Sequence[torch.dtype],
    *,
    metric: Metric = PLAIN,
    device: torch.device,
    rank_multiple: int = 1,
) -> list[Candidate]:
    """Return the candidates of a layer, dense first. metric: which of its errors count.

    rank_multiple: of which all ranks are, as ``rounded`` has it. A setting that cannot be fitted or stored, or saves
    nothing, is none.
    """
    working = working_copy(weight, device)
    trial = Trial(layer, working, metric, formats, device)
    dense = Candidate(None, None, layer.dense_bytes, 0, 0.0)
    if trial.is_zero:
        return [dense, *trial.stored(Sparse(density=0.0), types)]
    prospects = Prospects(layer, trial.outlooks, types, _SLACK[not (metric.is_plain or metric.is_block_of(weight))])
    found = [dense, *(trial.stored(Sparse(density=1.0), types) if Sparse in formats else ())]
    fitted = {
        kind: list(trial.of_format(list(prospects.worth(kind, _AMOUNTS, rank_multiple)), types)) for kind in formats
    }
    found += [each for candidates in fitted.values() for each in candidates]
    # Only beside the lower hull can a setting in between be worth anything.
    best = {id(found[at]) for at in hull([Point(each.stored_bytes, each.loss) for each in found])}
    for kind, candidates in fitted.items():
        for store in types:
            found += _interpolated(kind, layer, store, candidates, best, rank_multiple)
    return found


def _interpolated(
    kind: type[Format],
    layer: Layer,
    store: torch.dtype,
    fitted: Sequence[Candidate],
    best: Container[int],
    rank_multiple: int,
) -> Iterator[Candidate]:
    """Yield settings beside the best that were fitted; the logarithm of the loss is taken to be linear in the bytes.

    best: identities of the candidates that are worth it.
    """
    own = sorted((each for each in fitted if each.store == store), key=lambda each: each.stored_bytes)
    for low, high in pairwise(own):
        if id(low) not in best and id(high) not in best:
            continue
        gap = high.stored_bytes - low.stored_bytes
        seen: set[Any] = {low.format, high.format}
        for step in range(1, _BETWEEN + 1):
            setting = within(kind, layer.shape, store, low.stored_bytes + gap * step // (_BETWEEN + 1))
            setting = None if setting is None else rounded(setting, rank_multiple)
            if setting is None or setting in seen or high.loss >= low.loss:
                continue
            seen.add(setting)
            stored, header = planned_bytes(layer, setting, store, None)
            if low.stored_bytes < stored < high.stored_bytes and stored + header < layer.dense_bytes:
                part = (stored - low.stored_bytes) / gap
                loss = math.exp((1 - part) * math.log(low.loss) + part * math.log(high.loss))
                yield Candidate(setting, store, stored, header, loss, is_fitted=False)
