"""csr: compressed sparse rows, the arrays that scipy.sparse.csr_array holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from tcompress.encodings.base import FactorSpec, PartSpec, Place, Select, Support, bits_of, require
from tcompress.encodings.masks import scatter_at, select_by_mask

MAX_SHORT_COLUMNS = 1 << 16  # column numbers up to 65535 fit 16 bits


class CSR(Support):
    """Parts ``columns`` (nonzeros,) uint16 or int32 and ``row_starts`` (rows + 1,) int64."""

    name = "csr"
    part_names = ("columns", "row_starts")

    def stored(self, factor: FactorSpec) -> tuple[int, ...] | None:
        return None if factor.nonzeros is None or len(factor.shape) != 2 else (factor.nonzeros,)

    def parts(self, factor: FactorSpec) -> dict[str, PartSpec]:
        rows, columns = factor.shape
        return {
            "columns": PartSpec((factor.nonzeros or 0,), _column_type(columns)),
            "row_starts": PartSpec((rows + 1,), torch.int64),
        }

    def encode(self, factor: Tensor) -> tuple[dict[str, Tensor], Select]:
        rows, width = factor.shape
        mask = bits_of(factor).numpy() != 0
        starts = np.zeros(rows + 1, dtype=np.int64)
        np.cumsum(np.count_nonzero(mask, axis=1), out=starts[1:])
        flat = mask.reshape(-1)
        columns = np.flatnonzero(flat) - np.repeat(np.arange(rows) * width, np.diff(starts))
        parts = {
            "columns": torch.from_numpy(columns).to(_column_type(width)),
            "row_starts": torch.from_numpy(starts),
        }
        return parts, lambda tensor: select_by_mask(tensor, flat)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[tuple[int, ...], Place]:
        require(len(shape) == 2, f"is csr, but its shape {shape} is no matrix")
        rows, width = shape
        columns, starts = parts["columns"], parts["row_starts"]
        require(columns.ndim == 1, "has column numbers that are no plain list")
        require(columns.dtype == _column_type(width), f"has column numbers that are not {_column_type(width)}")
        require(starts.dtype == torch.int64 and starts.shape == (rows + 1,), f"has not {rows + 1} row starts")
        # Neighbours are compared, not subtracted: the difference of two starts that claim too much may be any number.
        rising = bool((starts[1:] >= starts[:-1]).all())
        in_order = int(starts[0]) == 0 and int(starts[-1]) == columns.numel() and rising
        require(in_order, "has row starts that do not rise from 0 to the number of its columns")
        numbers, firsts = columns.numpy().astype(np.int32), starts.numpy()
        outside = numbers.size > 0 and (int(numbers.min()) < 0 or int(numbers.max()) >= width)
        require(not outside, f"has column numbers outside 0 to {width - 1}")
        falls = np.flatnonzero(numbers[1:] <= numbers[:-1]) + 1
        require(bool(np.isin(falls, firsts).all()), "has column numbers that do not rise within a row")

        def place(values: Tensor) -> Tensor:
            # SciPy sees the bits as integers: it has no bfloat16. With one value for each place it only copies them.
            bits = bits_of(values).numpy()
            dense = sparse.csr_array((bits, numbers, firsts), shape=(rows, width)).toarray()
            return torch.from_numpy(dense).view(values.dtype)

        return (columns.numel(),), place

    def unpack(self, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Place:
        rows, width = shape
        columns, starts = parts["columns"], parts["row_starts"]
        firsts = torch.arange(rows, device=starts.device) * width
        positions = firsts.repeat_interleave(starts.diff(), output_size=columns.numel()).add_(columns.to(torch.int64))
        return lambda values: scatter_at(values, positions, shape)


def _column_type(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= MAX_SHORT_COLUMNS else torch.int32
