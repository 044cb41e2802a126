"""csr: compressed sparse rows, the arrays that scipy.sparse.csr_array holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from scipy import sparse

from tcompress.encodings.base import BITS, Encoding, FactorSpec, PartSpec, bits_of, require

MAX_SHORT_COLUMNS = 1 << 16  # column numbers up to 65535 fit 16 bits


class CSR(Encoding):
    """Parts ``values`` (nonzeros,), ``columns`` (nonzeros,) uint16 or int32, ``row_starts`` (rows + 1,) int64."""

    name = "csr"

    def parts(self, factor: FactorSpec) -> Mapping[str, PartSpec] | None:
        if factor.nonzeros is None or len(factor.shape) != 2:
            return None
        rows, columns = factor.shape
        return {
            "values": PartSpec((factor.nonzeros,), factor.dtype),
            "columns": PartSpec((factor.nonzeros,), _column_type(columns)),
            "row_starts": PartSpec((rows + 1,), torch.int64),
        }

    def encode(self, factor: torch.Tensor) -> Mapping[str, torch.Tensor]:
        # SciPy sees the bits as integers: it has no bfloat16, and would take -0.0 for a zero.
        matrix = sparse.csr_array(bits_of(factor).numpy())
        columns = torch.from_numpy(matrix.indices.astype(np.int64))
        return {
            "values": torch.from_numpy(matrix.data).view(factor.dtype),
            "columns": columns.to(_column_type(factor.shape[1])),
            "row_starts": torch.from_numpy(matrix.indptr.astype(np.int64)),
        }

    def decode(self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        require(len(shape) == 2, f"is csr, but its shape {shape} is no matrix")
        rows, width = shape
        values, columns, starts = parts["values"], parts["columns"], parts["row_starts"]
        require(values.ndim == 1 and columns.shape == values.shape, "has not one column number for each value")
        require(columns.dtype == _column_type(width), f"has column numbers that are not {_column_type(width)}")
        require(starts.dtype == torch.int64 and starts.shape == (rows + 1,), f"has not {rows + 1} row starts")
        # Neighbours are compared, not subtracted: the difference of two starts that claim too much may be any number.
        rising = bool((starts[1:] >= starts[:-1]).all())
        in_order = int(starts[0]) == 0 and int(starts[-1]) == values.numel() and rising
        require(in_order, "has row starts that do not rise from 0 to the number of values")
        columns = columns.to(torch.int64)
        require(not bool(((columns < 0) | (columns >= width)).any()), f"has column numbers outside 0 to {width - 1}")
        flat = torch.repeat_interleave(torch.arange(rows), starts.diff()) * width + columns
        require(not bool((flat.diff() <= 0).any()), "has column numbers that do not rise within a row")
        dense = torch.zeros(rows * width, dtype=BITS[values.dtype.itemsize])
        dense[flat] = bits_of(values)
        return dense.view(values.dtype).reshape(shape)


def _column_type(columns: int) -> torch.dtype:
    return torch.uint16 if columns <= MAX_SHORT_COLUMNS else torch.int32
