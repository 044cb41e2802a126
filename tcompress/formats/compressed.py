"""Compressed rows of torch: where it has them, and how they are made."""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

ROW_TYPES = (torch.float32, torch.float64)  # for others torch has no product with compressed rows


def can_run(matrix: Tensor) -> bool:
    """Tell whether a matrix can be made compressed rows here and now."""
    return matrix.dtype in ROW_TYPES and matrix.device.type != "meta" and not torch.compiler.is_compiling()


def compressed_rows(matrix: Tensor) -> Tensor:
    """Return a matrix as torch's compressed rows with 32-bit column numbers: those of 64 bits lose a third."""
    announce_once()
    rows = matrix.to_sparse_csr()
    starts, columns = rows.crow_indices().to(torch.int32), rows.col_indices().to(torch.int32)
    return torch.sparse_csr_tensor(starts, columns, rows.values(), rows.shape, check_invariants=False)


@lru_cache(maxsize=1)
def announce_once() -> None:
    """Let torch say, unheard, that its compressed rows are in beta: it says so once in a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()
