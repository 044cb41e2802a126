"""Sparse matrices at work: compressed rows, by torch or SciPy, whichever is faster for what comes in."""

from __future__ import annotations

import math

import torch
from scipy import sparse as scipy_sparse
from torch import Tensor

from tcompress.formats.base import Factorization
from tcompress.formats.compressed import compressed_rows
from tcompress.formats.effort import sparse_effort

_SMALL = 30_000  # nonzeros below which SciPy answers sooner


class CompressedRows(Factorization):
    """A matrix (out, in) as compressed rows, for inputs that need no gradient of its values."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.shape = tuple(matrix.shape)
        self.rows, self.device = compressed_rows(matrix), matrix.device
        self.nonzeros = int(self.rows.values().numel())
        self._scipy: scipy_sparse.csr_array | None = None

    def reconstruct(self) -> Tensor:
        return self.rows.to_dense()

    def can_compile(self) -> bool:
        return False  # compressed rows are unknown there

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        del groups, steps
        if torch.is_autocast_enabled(self.device.type):  # it asks for types that have no such product
            return math.inf
        return sparse_effort(self.nonzeros, n)

    def linear(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.shape[1])
        if len(flat) == 1 and self._suits_scipy(x):
            return torch.from_numpy(self._in_scipy() @ flat[0].numpy()).reshape(*x.shape[:-1], self.shape[0])
        return (self.rows @ flat.T).T.reshape(*x.shape[:-1], self.shape[0])

    def _suits_scipy(self, x: Tensor) -> bool:
        """Tell whether SciPy is faster for one input: it uses one thread, and has less to do before it starts."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or x.requires_grad:
            return False
        return torch.get_num_threads() == 1 or self.nonzeros < _SMALL

    def _in_scipy(self) -> scipy_sparse.csr_array:
        if self._scipy is None:
            parts = (self.rows.values(), self.rows.col_indices(), self.rows.crow_indices())
            out, in_ = self.shape
            self._scipy = scipy_sparse.csr_array(tuple(part.numpy() for part in parts), shape=(out, in_))
        return self._scipy
