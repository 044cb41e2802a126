"""From a fit of the weight to a fit for the layer's output, for every format alike.

Letters: out, fan_in as in base; G = the second moment of the layer's input; E = weight - its reconstruction, as
(out, fan_in). The error of the output is tr(E G ET).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor
from torch.func import functional_call

from tcompress.formats.base import Factorization, matrix_of
from tcompress.linalg.multilinear import refine
from tcompress.linalg.output_error import output_error, require_moment
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two

Found = TypeVar("Found", bound=Factorization)


def unit_moment(weight: Tensor, gram: Tensor) -> Tensor:
    """Return G at a size that can be squared: its size says nothing of what is best.

    Raises NumericalError when gram is no second moment of this weight's inputs.
    """
    require_moment(gram, matrix_of(weight).shape[1])
    return scaled_to_unit(gram.detach().to(weight.device))[0].to(weight.dtype).contiguous()


def error_for_output(found: Factorization, weight: Tensor, gram: Tensor) -> float:
    """Return the root of tr(E G ET), summed in float64; of very large and small weights a power of two of it."""
    rest = matrix_of(weight.double() - found.reconstruct().detach().double()).contiguous()
    exponent = scaled_to_unit(weight)[1]  # near the ends of the range, in units of the weight: it is for comparisons
    return output_error(times_power_of_two(rest, -exponent) if exponent else rest, gram.double())


def best_for_output(candidates: Sequence[Factorization], weight: Tensor, gram: Tensor) -> Factorization:
    """Return the candidate with the smallest error of the output, of equal ones the first."""
    return min(candidates, key=lambda found: error_for_output(found, weight, gram))


def refined(found: Found, weight: Tensor, gram: Tensor | None, *, keeps_zeros: bool = False) -> Found:
    """Give the factors of a fit better values for the output, if a second moment is given; never worse ones.

    found: its weight is linear in each of its factors. keeps_zeros: entries that are zero stay so.
    """
    if gram is None:
        return found
    moment, names = unit_moment(weight, gram), [name for name, _ in found.named_parameters()]
    before = error_for_output(found, weight, moment)

    def rebuild(factors: Sequence[Tensor]) -> Tensor:
        dense: Tensor = functional_call(found, dict(zip(names, factors, strict=True)), ("reconstruct",))
        return dense.reshape(dense.shape[0], -1)

    given = [parameter.detach() for parameter in found.parameters()]
    better = refine(rebuild, given, matrix_of(weight).contiguous(), moment, keeps_zeros=keeps_zeros)
    _put(found, [factor.to(weight.dtype) for factor in better])
    # Measured on what is kept: rounding may have taken back what the search has gained.
    if not error_for_output(found, weight, moment) < before:
        _put(found, given)
    return found


def _put(found: Factorization, factors: Sequence[Tensor]) -> None:
    for parameter, factor in zip(found.parameters(), factors, strict=True):
        parameter.data = factor  # not copied into the old memory, which may be that of the input
