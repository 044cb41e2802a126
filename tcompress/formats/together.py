"""From a fit of several weights as one to a fit for the outputs of all their layers, for every group format alike.

Letters: N = members; out, fan_in as in base; E_i, G_i, c_i = error and metric of a member, as in metric. The error made
small is the sum over members of tr(E_i G_i E_iT), or tr(E_iT diag(c_i) E_i): how much a member counts beside the others
is the size of its metric.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from tcompress.errors import NumericalError
from tcompress.formats.base import Factorization, matrix_of
from tcompress.formats.metric import Metric
from tcompress.linalg.multilinear import refine
from tcompress.linalg.output_error import whole_of
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two

Factors = Mapping[str, Tensor]
Fit = tuple[Factors, list[Factors]]  # what all members share, and what is each one's own
Load = Callable[[Factors], Factorization]


def unit_metrics(weights: Sequence[Tensor], metrics: Sequence[Metric]) -> list[Metric]:
    """Return the members' metrics in float64, all in one unit in which they can be squared.

    Raises NumericalError when one of them is none of its weight, or their number is another.
    """
    if len(metrics) != len(weights):
        raise NumericalError(f"{len(weights)} weights have as many metrics, got {len(metrics)}")
    for weight, metric in zip(weights, metrics, strict=True):
        metric.require_fit(weight)
    given = [(metric.gram if metric.rows is None else metric.rows) for metric in metrics]
    there = [values for values in given if values is not None]
    exponent = max((scaled_to_unit(values)[1] for values in there), default=0)
    device = weights[0].device

    def unit(values: Tensor | None) -> Tensor | None:
        return None if values is None else times_power_of_two(values.detach().to(device).double(), -exponent)

    plain = times_power_of_two(torch.ones(weights[0].shape[0], dtype=torch.float64, device=device), -exponent)
    return [Metric(rows=plain) if m.is_plain else Metric(unit(m.gram), unit(m.rows)) for m in metrics]


def error_together(load: Load, found: Fit, weights: Sequence[Tensor], metrics: Sequence[Metric]) -> float:
    """Return the error that is summed over all members, in a unit of the weights: it is for comparisons.

    metrics: as ``unit_metrics`` gives them.
    """
    exponent = max(scaled_to_unit(weight)[1] for weight in weights)
    total = 0.0
    for weight, own, metric in zip(weights, found[1], metrics, strict=True):
        rest = weight.double() - load({**found[0], **own}).reconstruct().detach().double()
        total += metric.square(times_power_of_two(rest, -exponent) if exponent else rest)
    return total


def refined_together(load: Load, found: Fit, weights: Sequence[Tensor], metrics: Sequence[Metric]) -> Fit:
    """Give the factors of all members better values for their outputs; never worse ones.

    load: factors -> a weight, linear in each of them. metrics: as ``unit_metrics`` gives them.
    """
    shared, own = found
    names, own_names = list(shared), list(own[0])
    one = load({**shared, **own[0]})
    lay, moment = _side_by_side(weights, metrics)

    def rebuild(factors: Sequence[Tensor]) -> Tensor:
        common = dict(zip(names, factors, strict=False))
        each = zip(*(stacked.unbind() for stacked in factors[len(names) :]), strict=True)
        dense = [
            functional_call(one, {**common, **dict(zip(own_names, its, strict=True))}, ("reconstruct",)) for its in each
        ]
        return lay([matrix_of(weight) for weight in dense])

    # What is each member's own is one factor as well, or there would be as many steps as members.
    given = [*shared.values(), *(torch.stack([each[name] for each in own]) for name in own_names)]
    target = lay([matrix_of(weight) for weight in weights]).contiguous()
    better = [factor.to(target.dtype) for factor in refine(rebuild, given, target, moment)]
    common: Factors = dict(zip(names, better, strict=False))
    parts = zip(*(stacked.unbind() for stacked in better[len(names) :]), strict=True)
    each: list[Factors] = [dict(zip(own_names, its, strict=True)) for its in parts]
    # Measured on what is kept: rounding may have taken back what the search has gained.
    is_better = error_together(load, (common, each), weights, metrics) < error_together(load, found, weights, metrics)
    return (common, each) if is_better else found


def of_inputs(metric: Metric, fan_in: int) -> Tensor:
    """Return G whole or its diagonal; where rows count, a diagonal as if all of them counted alike."""
    if metric.gram is not None:
        return metric.gram if metric.gram.ndim == 1 else whole_of(metric.gram, fan_in)
    assert metric.rows is not None, "it is a unit metric"  # noqa: S101
    return metric.rows.mean().expand(fan_in)


def _side_by_side(
    weights: Sequence[Tensor], metrics: Sequence[Metric]
) -> tuple[Callable[[Sequence[Tensor]], Tensor], Tensor]:
    """Return how matrices (out, fan_in) become one tensor, and the moment of that tensor's last dimension.

    Diagonals stay diagonals, side by side; of members of which some have rows that count and others inputs, the inputs
    count.
    """
    dtype, fan_in = weights[0].dtype, weights[0][0].numel()
    rows = [metric.rows for metric in metrics if metric.rows is not None]
    if len(rows) == len(metrics):
        return lambda matrices: torch.cat([matrix.T for matrix in matrices], dim=1), torch.cat(rows).to(dtype)
    inputs = [of_inputs(metric, fan_in).to(dtype) for metric in metrics]
    if all(gram.ndim == 1 for gram in inputs):
        return lambda matrices: torch.cat(list(matrices), dim=1), torch.cat(inputs)
    full = [torch.diag(gram) if gram.ndim == 1 else gram for gram in inputs]
    return lambda matrices: torch.stack(list(matrices)), torch.stack(full)
