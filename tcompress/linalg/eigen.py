"""Eigenvalues of symmetric matrices, where LAPACK's fastest way fails too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not in its __all__

from tcompress.errors import NumericalError


def symmetric_eigen(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors of a matrix without negative eigenvalues.

    LAPACK's divide and conquer fails on a few matrices with many equal eigenvalues, others in each version: it does
    not converge, or says nothing and returns NaN. There the singular vectors, which are the same, mostly come out.
    Raises NumericalError where not.
    """
    try:
        values, vectors = torch.linalg.eigh(gram)
        if values.isfinite().all() and vectors.isfinite().all():
            return values, vectors
    except LinAlgError:
        pass
    try:
        vectors, values, _ = torch.linalg.svd(gram)
    except LinAlgError as error:
        raise NumericalError("the singular value decomposition does not converge") from error
    return values.flip(0), vectors.flip(1)
