"""Codes chosen for the layer's output: each rounding error is made good by the values beside it, in the metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from tcompress.encodings import Levels
from tcompress.formats import Format
from tcompress.formats.base import matrix_of
from tcompress.formats.metric import Metric
from tcompress.linalg.rounding import descend_on_grid
from tcompress.workflow.stored import StoredFactor, rebuild

_PASSES = 2


def rounded_for_output(
    stored: Mapping[str, StoredFactor], setting: Format, target: Tensor, metric: Metric
) -> dict[str, StoredFactor]:
    """Return the factors with other codes in the one that is added as it is, if that lowers the error in the metric.

    stored: factors of ``target``. Scales stay, and which values are stored; others are as they were. Without a moment
    of the inputs, or without codes, nothing changes.
    """
    name = setting.added_matrix
    if metric.gram is None or metric.gram.ndim == 1 or name is None or stored[name].coding.values is None:
        return dict(stored)
    factor, on = stored[name], metric.like(target)
    assert on.gram is not None  # noqa: S101
    whole = _rebuilt(stored, setting, target)
    around = matrix_of(whole) - factor.values.to(target)
    steps = factor.coding.steps(factor.parts, tuple(factor.values.shape))
    levels = factor.coding.levels(factor.parts)
    free = _free(factor.values, steps, levels)
    found = descend_on_grid(
        matrix_of(target) - around,
        factor.values.to(target),
        free.to(target),
        (levels.least, levels.most),
        on.gram,
        passes=_PASSES,
        shift=levels.shift,
    ).cpu()
    codes = levels.codes(_multiples(found, steps))
    parts = factor.coding.recoded(factor.parts, codes)
    values = factor.coding.decode(parts, tuple(factor.values.shape))
    changed = {**stored, name: replace(factor, parts=parts, values=values)}
    gains = on.square(target - _rebuilt(changed, setting, target)) < on.square(target - whole)
    return changed if gains else dict(stored)


def _multiples(values: Tensor, steps: Tensor) -> Tensor:
    return torch.where(steps == 0, 0, values / torch.where(steps == 0, 1, steps))


def _free(values: Tensor, steps: Tensor, levels: Levels) -> Tensor:
    """Return the steps of values that may change, else 0: zeros stay zeros, and the largest codes what they are.

    By these the scales are found again when the values are encoded once more.
    """
    codes = levels.codes(_multiples(values, steps))
    return torch.where((codes == 0) | (codes.abs() >= levels.most), 0, steps)


def _rebuilt(stored: Mapping[str, StoredFactor], setting: Format, target: Tensor) -> Tensor:
    values = {name: factor.values for name, factor in stored.items()}
    found = rebuild(setting, tuple(target.shape), values, dtype=target.dtype, device=target.device)
    return found.to(target.device)
