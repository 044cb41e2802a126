"""A sparse weight that learns, given as its values at places that stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tcompress.formats.base import Factorization, Shape
from tcompress.formats.effort import dense_effort
from tcompress.formats.pattern import Pattern, rows_in


class PlacedMatrix(Factorization):
    """matrix: (k,), the values of a sparse weight at the places of a pattern, which is asked for when it is needed."""

    def __init__(self, shape: Shape, pattern: Callable[[], Pattern]) -> None:
        super().__init__()
        self.shape = shape
        self.matrix = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)  # given for each call
        self._pattern = pattern

    def reconstruct(self) -> Tensor:
        return self._pattern().dense(self.matrix).reshape(self.shape)

    def linear(self, x: Tensor) -> Tensor:
        if self.learning_effort(x) < dense_effort(math.prod(self.shape), rows_in(x)):
            return self._pattern().linear(x, self.matrix)
        return super().linear(x)

    def learning_effort(self, x: Tensor) -> float:
        """Return how long compressed rows take for an input; infinite where there are none."""
        pattern = self._pattern()
        return pattern.effort(rows_in(x)) if pattern.suits(x, self.matrix) else math.inf
