"""What errors the settings of a format have on a weight, told without fitting any: one decomposition for all sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tcompress.errors import FormatError
from tcompress.formats import Format
from tcompress.formats.base import matrix_of
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.tucker import Tucker
from tcompress.linalg.output_error import times
from tcompress.linalg.scaling import scaled_to_unit
from tcompress.linalg.svd import left_out

NO_TELLING = "each of its sizes is a fit of its own: no one decomposition tells the errors of all"
TOLD = (SVD, Sparse, TT, Tucker)

Bounds = Callable[[Any], tuple[float, float]]  # setting -> what its error cannot be below, and cannot exceed


def bounds_of(weight: Tensor, first: Format, root: Tensor | None = None) -> Bounds:
    """Return the relative errors of all settings that differ from ``first`` in their size alone.

    weight: finite. root: C with C CT the second moment of the layer's input, (fan_in, fan_in), or its diagonal
    (fan_in,): with it they are errors of the output, ||(W - W') C|| over ||W C||.

    Raises FormatError when there is no telling them, NumericalError when a decomposition breaks down.
    """
    if isinstance(first, SVD):
        return _of_matrix(weight, first, root)
    if isinstance(first, Sparse):
        return _of_values(weight, first, root)
    if isinstance(first, TT | Tucker):
        if root is not None:
            raise FormatError("bounds of its truncations are those of the weight, not of the layer's output")
        return _of_unfoldings(weight, first)
    raise FormatError(NO_TELLING)


def _of_matrix(weight: Tensor, first: SVD, root: Tensor | None) -> Bounds:
    """Eckart & Young 1936; in the metric of the input the best is that of W C: ||(W - L) C|| >= its tail."""
    if root is not None and not first.by_rows and weight.ndim > 2:
        raise FormatError("the columns of its spatial matrix are no inputs of the layer")
    matrix = first.matrix(weight)
    lost = left_out(matrix if root is None else times(matrix.double(), root)).sqrt().cpu()

    def bounds(setting: SVD) -> tuple[float, float]:
        error = float(lost[min(setting.rank, len(lost) - 1)])
        return error, error

    return bounds


def _of_values(weight: Tensor, first: Sparse, root: Tensor | None) -> Bounds:
    """Keep the largest values; with a diagonal moment, those that do most to the output."""
    if first.m is not None:
        raise FormatError("groups of n:m keep few different numbers of values; ask for these settings")
    if root is not None and root.ndim > 1:
        raise FormatError("which values to keep is another search at each density where inputs are correlated")
    matrix = matrix_of(weight)
    counted = matrix if root is None else times(matrix.double(), root)
    magnitudes = scaled_to_unit(counted.contiguous())[0].reshape(-1).abs().sort().values
    lost = magnitudes.double().square_().cumsum_(dim=0).cpu()
    whole, values = float(lost[-1]) or 1.0, len(lost)

    def bounds(setting: Sparse) -> tuple[float, float]:
        dropped = values - setting.kept(values)
        error = math.sqrt(float(lost[dropped - 1]) / whole) if dropped else 0.0
        return error, error

    return bounds


def _of_unfoldings(weight: Tensor, first: TT | Tucker) -> Bounds:
    """Truncate all unfoldings: that loses at least the largest loss of one, at most the sum (Oseledets 2011, 2.2).

    The successive truncations of Tucker keep to the same sum (Vannieuwenhoven et al. 2012, theorem 6.5). Of a padded
    tensor nothing is below: what a fit gets wrong in the padding does not count.
    """
    folding = first.folding(tuple(weight.shape))
    lost = [left_out(matrix).cpu() for matrix in first.unfoldings(folding.fold(weight))]

    def bounds(setting: TT | Tucker) -> tuple[float, float]:
        squares = [float(each[rank]) for each, rank in zip(lost, setting.clipped(folding), strict=True)]
        upper = math.sqrt(min(1.0, math.fsum(squares)))
        return (0.0 if folding.is_padded else math.sqrt(max(squares, default=0.0))), upper

    return bounds
