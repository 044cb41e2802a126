"""split_off against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from tcompress.errors import NumericalError
from tcompress.linalg.subspace import split_off


def matrix_of(rows, columns, decay, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + columns)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64)).Q
    return ((left * decay ** torch.arange(rows)) @ right.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.9, 0.5])
@pytest.mark.parametrize(("rows", "columns"), [(20, 300), (300, 400), (40, 40)])
def test_the_error_is_the_best_of_the_rank(rows, columns, decay, dtype):
    matrix = matrix_of(rows, columns, decay, dtype)
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 7, rows):
        left, rest = split_off(matrix, rank)
        assert left.shape == (rows, rank)
        torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=dtype), rtol=0, atol=1e-5)
        lost = torch.linalg.vector_norm(matrix.double() - left.double() @ rest.double())
        best = torch.linalg.vector_norm(values[rank:])
        assert lost <= best * (1 + 2e-6) + 2e-6 * torch.linalg.vector_norm(values)


@pytest.mark.parametrize("scale", [1e-36, 1e34])
def test_the_range_of_the_values_does_not_matter(scale):
    matrix = matrix_of(20, 300, 0.8)
    left, rest = split_off(matrix * scale, 5)
    plain, _ = split_off(matrix, 5)
    torch.testing.assert_close(left, plain, rtol=1e-3, atol=1e-4)
    assert rest.isfinite().all()


def test_what_exceeds_the_type_is_an_error():
    with pytest.raises(NumericalError, match="exceeds the range"):
        split_off(torch.full((20, 3000), 3e38), 2)


def test_a_matrix_of_zeros_gives_zeros():
    left, rest = split_off(torch.zeros(10, 30), 3)
    assert left.isfinite().all()
    assert not rest.any()
