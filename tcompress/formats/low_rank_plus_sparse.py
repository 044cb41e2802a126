"""A low-rank factorization and a sparse matrix as one weight: what `low-rank-sparse` is once it is fitted.

Letters: L, S = the low-rank and the sparse part, (out, fan_in).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tcompress.formats.addends import Addends
from tcompress.formats.base import Factorization, Shape
from tcompress.formats.effort import adding_effort, dense_effort
from tcompress.formats.pattern import Patterns, rows_in
from tcompress.formats.placed import PlacedMatrix
from tcompress.formats.sparse import SparseMatrix


class LowRankPlusSparse(Factorization):
    """low_rank: a factorization, or None; sparse: (out, fan_in), added to it or, with masking, put in its place."""

    def __init__(self, shape: Shape, low_rank: Factorization | None, sparse: Factorization, *, masking: bool) -> None:
        super().__init__()
        self.shape, self.masking = shape, masking
        self.low_rank = low_rank
        self.sparse = sparse

    def reconstruct(self) -> Tensor:
        sparse = self.sparse.reconstruct()
        if self.low_rank is None:
            return sparse
        low = self.low_rank.reconstruct()
        if self.masking:
            return torch.where(sparse == 0, low, sparse)
        # Three matrices of the weight's size are one too many where nothing is to be differentiated.
        return low + sparse if torch.is_grad_enabled() or self._holds(low) else low.add_(sparse)

    def linear(self, x: Tensor) -> Tensor:
        if self.low_rank is None:
            return self.sparse.linear(x)
        if not self._learns_apart(self.low_rank, x):
            return super().linear(x)
        return self.low_rank.linear(x) + self.sparse.linear(x)

    def _learns_apart(self, low_rank: Factorization, x: Tensor) -> bool:
        """Tell whether a training step is sooner done with a product for each part than with one for their sum."""
        is_measured = x.device.type == "cpu"
        if self.masking or not isinstance(self.sparse, PlacedMatrix) or not is_measured:
            return False
        n = rows_in(x)
        one = dense_effort(math.prod(self.shape), n)
        both = low_rank.effort(n) + min(one, self.sparse.learning_effort(x)) + adding_effort(sum(self.shape), n)
        return both < one + low_rank.rebuilding()

    def scale_rows(self, scales: Tensor) -> None:
        for part in (self.low_rank, self.sparse):
            if part is not None:
                part.scale_rows(scales)

    def on_places(self, patterns: Patterns) -> tuple[Factorization, frozenset[str]]:
        if "sparse.matrix" not in patterns:
            return self, frozenset()
        sparse = PlacedMatrix(self.shape, patterns["sparse.matrix"])
        placed = LowRankPlusSparse(self.shape, self.low_rank, sparse, masking=self.masking)
        return placed, frozenset({"sparse.matrix"})

    def prepared(self) -> Factorization:
        if len(self.shape) > 2 or torch.compiler.is_compiling():
            return self
        if self.low_rank is None:
            return self.sparse.prepared()
        sparse = self.sparse.reconstruct().detach()
        if self.masking:  # what is added to L instead of standing in its place
            sparse = torch.where(sparse == 0, 0, sparse - self.low_rank.reconstruct().detach())
        rows = SparseMatrix(self.shape, sparse).requires_grad_(False).prepared()
        return Addends(self.shape, [self.low_rank.prepared(), rows])

    def _holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor lies in the memory of a factor, as a reshaped one does."""
        if torch.compiler.is_compiling():  # where memory has no address yet
            return True
        memory = tensor.untyped_storage().data_ptr()
        return any(factor.untyped_storage().data_ptr() == memory for factor in self.parameters())
