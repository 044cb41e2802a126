"""Which errors of a weight count how much, and the fit that makes those small.

Letters: E = weight - its reconstruction, (out, fan_in); G = second moment of the layer's input, (fan_in, fan_in), its
diagonal, or the block that its diagonal repeats, as in linalg/output_error; c = how much each row counts, (out,): of an
embedding, how often it is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.errors import NumericalError
from tcompress.formats.base import Factorization, Format, matrix_of
from tcompress.linalg.output_error import diagonal_of, require_moment, root_of, times


@dataclass(frozen=True)
class Metric:
    """gram: G; rows: c, all above zero. At most one of them; with neither all entries count alike."""

    gram: Tensor | None = None
    rows: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the error is that of the weight itself."""
        return self.gram is None and self.rows is None

    def require_fit(self, weight: Tensor) -> None:
        """Raise NumericalError unless this can be a metric of the weight's errors."""
        if self.gram is not None:
            require_moment(self.gram, weight[0].numel())
        elif self.rows is not None and (self.rows.shape != weight.shape[:1] or not bool((self.rows > 0).all())):
            raise NumericalError(f"what rows count is {len(weight)} positive numbers, got {tuple(self.rows.shape)}")

    def like(self, weight: Tensor) -> Metric:
        """Return the metric on the weight's device, in its type."""
        return Metric(*(None if each is None else each.to(weight) for each in (self.gram, self.rows)))

    def square(self, error: Tensor) -> float:
        """Return tr(E G ET), or tr(ET diag(c) E), summed in float64."""
        matrix = matrix_of(error)
        if self.rows is not None:
            return float((matrix.square().sum(dim=1, dtype=torch.float64) * self.rows.to(matrix.device)).sum())
        if self.gram is None:
            return float(torch.linalg.vector_norm(matrix)) ** 2
        return max(0.0, float((times(matrix, self.gram) * matrix).sum(dtype=torch.float64)))

    def counted(self, weight: Tensor) -> float:
        """Return how many values of the weight count, as if all of these did alike: all, or those of so many rows.

        So many equal rows would have the same mean and mean square of c: (sum c)² / sum c².
        """
        if self.rows is None:
            return float(weight.numel())
        rows = self.rows.double()
        return float(rows.sum().square() / rows.square().sum()) * weight[0].numel()

    def seen_in(self, weight: Tensor) -> Tensor:
        """Return the weight with its columns at the size of their inputs, or its rows at what they count.

        A block is seen whole: the squared norm of what comes back is the error of the output, without the layer.
        """
        if self.is_plain:
            return weight
        if self.rows is not None:
            return weight * self._sizes(weight)
        assert self.gram is not None  # noqa: S101
        matrix = matrix_of(weight)
        if self.is_block_of(weight):
            return times(matrix, root_of(self.gram)).reshape(weight.shape)
        return (matrix * diagonal_of(self.gram, matrix.shape[1]).sqrt()).reshape(weight.shape)

    def is_block_of(self, weight: Tensor) -> bool:
        """Tell whether this is a block that the moment of the weight's inputs repeats."""
        return self.gram is not None and self.gram.ndim == 2 and len(self.gram) < weight[0].numel()

    def fit(self, setting: Format, weight: Tensor) -> Factorization:
        """Return the fit of which the error in this metric is small. Raises as ``Format.fit``.

        Where rows count differently each is given its size in the sum, and the factors give it its own back. That is
        exact for formats that keep rows apart, ``by_rows``; others are fitted as if all counted alike.
        """
        if self.rows is None or not setting.by_rows:
            return setting.fit(weight) if self.gram is None else setting.fit(weight, self.gram)
        self.require_fit(weight)
        sizes = self._sizes(weight)
        found = setting.fit(weight * sizes)
        found.scale_rows(1 / sizes.reshape(-1))
        return found

    def _sizes(self, weight: Tensor) -> Tensor:
        """Return the root of c at most 1, to be multiplied with the weight."""
        assert self.rows is not None  # noqa: S101
        return (self.rows / self.rows.max()).sqrt().to(weight).reshape(-1, *[1] * (weight.ndim - 1))


PLAIN = Metric()
