"""The fewest bytes of one layer within an error: candidates are expectations until they are fitted as for a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tcompress.errors import FormatError, NumericalError
from tcompress.formats import Format
from tcompress.formats.metric import PLAIN, Metric
from tcompress.workflow.fitting import fit
from tcompress.workflow.stored import rebuild
from tcompress.workflow.trial import Candidate


def cheapest_within(
    weight: Tensor, curve: Sequence[Candidate], max_error: float, *, metric: Metric = PLAIN, device: torch.device
) -> Candidate:
    """Return the candidate of the fewest bytes whose error, as it is stored, is at most ``max_error``.

    metric: which errors count. The dense layer is the last resort.
    """
    for each in sorted(curve, key=lambda candidate: (candidate.stored_bytes, candidate.loss)):
        if each.format is None or each.store is None:
            return each
        if each.loss > max_error**2:
            continue
        try:
            error, stored_bytes = _fitted(weight, each.format, each.store, metric, device)
        except (FormatError, NumericalError):
            continue
        if error <= max_error:
            return replace(each, stored_bytes=stored_bytes, loss=error**2, is_fitted=True)
    raise AssertionError("the dense layer is a candidate")


def _fitted(
    weight: Tensor, setting: Format, store: torch.dtype, metric: Metric, device: torch.device
) -> tuple[float, int]:
    """Return error and bytes of a weight as it is stored."""
    found = fit(weight, setting, store=store, device=device, metric=metric)
    if metric.is_plain:
        return found.relative_error, found.stored_bytes
    rebuilt = rebuild(setting, found.shape, found.factors, dtype=weight.dtype, device=device)
    wide = weight.double()
    exact = metric.like(wide)
    whole = exact.square(wide)
    return math.sqrt(exact.square(wide - rebuilt.double()) / whole) if whole else 0.0, found.stored_bytes
