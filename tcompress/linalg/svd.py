"""The truncated singular value decomposition: as exact as needed, with as few passes over the matrix as possible.

Letters: m, n = rows and columns of the matrix; r = rank; k = columns of the Krylov basis; b = columns of one block.
Inside, the matrix is turned so that m >= n: "long" vectors have m entries, "short" ones n.

C. Eckart, G. Young, "The approximation of one matrix by another of lower rank", 1936: what the best error is.
N. Halko, P.-G. Martinsson, J. Tropp, "Finding structure with randomness", 2011: random start, measured residual.
C. Musco, C. Musco, "Randomized block Krylov methods for stronger and faster approximate SVD", 2015: all blocks kept.
A. Stathopoulos, K. Wu, "A block orthogonalization procedure with constant synchronization requirements", 2002.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # documented, but not in its __all__

from tcompress.errors import NumericalError
from tcompress.linalg.eigen import symmetric_eigen
from tcompress.linalg.scaling import scaled_to_unit, times_power_of_two

RELATIVE_EXCESS = 1e-3  # the Frobenius error may be this much above the best of its rank, if not said otherwise
ABSOLUTE_EXCESS = 1e-6  # ... or by this much of the norm: what float32 weights cannot tell apart

_SAFETY = 0.5  # of the allowed excess, the part that the estimate of it may use
_SLOWEST = 0.9  # a larger ratio of successive gains is taken for rounding noise
_FLOAT32_MEASURES = 1e-3  # of ||A||^2; a smaller residual is rounded away in a difference of float32 sums
_FLOAT32_DECOMPOSES = 1e-2  # of ||A||^2; a larger residual hardly feels the rounding of a float32 Gram matrix
_DEPENDENT = 1e-12  # eigenvalue of a block's Gram matrix, over the largest, below which a direction is rounding noise
_GRADED = 1e-4  # value over the largest, below which the float64 Gram matrix leaves long vectors not orthogonal
_GRAM_RESOLVES = 1e-6  # value over the largest, below which the float64 Gram matrix gives fewer than three digits
_SPARE_COLUMNS = 8  # of a block beyond the rank, as Halko et al. advise
_COLUMN_STEP = 16  # matrix products run fastest at multiples of the vector registers
_FEWEST_COLUMNS = 32  # with fewer a pass over a large matrix takes no less time: reading it is then the limit
_LARGEST_BASIS = 0.6  # of n; beyond it the exact path is cheaper
_ROWS_AT_ONCE = 8192  # converted to float64 at one time


def truncated_svd(
    matrix: Tensor, rank: int, *, seed: int = 0, excess: float = RELATIVE_EXCESS
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` leading singular triplets of ``matrix``, all of them if it has fewer.

    matrix: (m, n), float32 or float64, not empty; rank >= 1.
    left: (m, r), orthonormal columns, the largest magnitude of each positive; values: (r,), descending;
    right: (r, n), orthonormal rows; r = min(rank, m, n).

    ||A - left diag(values) right|| is at most (1 + excess) times the smallest possible (Eckart and Young
    1936) plus ABSOLUTE_EXCESS ||A||: by construction where the Gram matrix is decomposed whole; by an estimate from
    the gains of successive steps where a randomised block Krylov space (Musco and Musco 2015) is cheaper. The same
    matrix and seed give the same bits on the same machine and number of threads.

    Raises NumericalError if an entry is NaN or infinite, or a singular value exceeds the range of the dtype.
    """
    r = min(rank, *matrix.shape)
    scaled, exponent = scaled_to_unit(matrix.detach())
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = scaled.T if is_wide else scaled
    exact = _exact_is_cheaper(max(matrix.shape), min(matrix.shape), r, excess)
    found = None if exact else _krylov_subspace(tall, r, seed, excess)
    if found is None:
        found = _gram_subspace(tall, r)
    long, values, short = _triplets(*found)
    left, right = (short, long) if is_wide else (long, short)
    signs = left.gather(0, left.abs().argmax(dim=0, keepdim=True)).sign()
    values = times_power_of_two(values, exponent).to(matrix.dtype)
    if not values.isfinite().all():
        raise NumericalError(f"a singular value exceeds the range of {matrix.dtype}; scale the weight down")
    return (left * signs).to(matrix.dtype), values, (right * signs).T.to(matrix.dtype).contiguous()


def singular_values(matrix: Tensor) -> Tensor:
    """Return all singular values of ``matrix``: (min(m, n),) float64, descending.

    matrix: (m, n), float32 or float64, not empty. Raises NumericalError for NaN and infinity, or if LAPACK fails.

    The float64 Gram matrix costs a fraction of a bidiagonalisation, but squares the condition number: a value below
    1e-6 of the largest would have fewer than three digits. Where there is one the matrix itself is decomposed.
    """
    scaled, exponent = scaled_to_unit(matrix.detach())
    tall = scaled if matrix.shape[0] >= matrix.shape[1] else scaled.T
    try:
        values = torch.linalg.eigvalsh(_gram(tall)).flip(0).clamp_min(0).sqrt()
        if not values[-1] >= _GRAM_RESOLVES * values[0]:  # of NaN, which LAPACK may return unannounced, as well
            values = torch.linalg.svdvals(tall.double())
    except LinAlgError as error:
        raise NumericalError("the singular values do not converge") from error
    return times_power_of_two(values, exponent)


def left_out(matrix: Tensor) -> Tensor:
    """Return what the best matrix of rank 0, 1, 2, ... leaves out, squared, over the whole: (min(m, n) + 1,) float64.

    matrix: (m, n), float32 or float64, finite. Of a zero matrix it is 0 throughout. From the Gram matrix alone: to the
    digits of float64, of the whole.
    """
    scaled = scaled_to_unit(matrix.detach())[0]
    tall = scaled if matrix.shape[0] >= matrix.shape[1] else scaled.T
    try:
        squares = torch.linalg.eigvalsh(_gram(tall)).clamp_min(0)  # ascending
    except LinAlgError as error:
        raise NumericalError("the singular values do not converge") from error
    lost = torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)
    return lost / lost[0] if lost[0] > 0 else lost


def rank_for_error(values: Tensor, relative_error: float) -> int:
    """Return the smallest rank, 1 or more, whose best relative Frobenius error is at most ``relative_error``.

    values: all singular values, descending. By Eckart and Young (1936) that error is the root of the sum of squares
    of the values left out, over that of all. Of a zero matrix the rank is 0.
    """
    if values[0] == 0:
        return 0
    squares = (values.double() / values[0].double()).square()
    # Summed from the smallest up: the tail of a fast decay would be lost in a difference of large sums.
    from_rank = squares.flip(0).cumsum(0).flip(0)  # (min(m, n),): what rank 0, 1, 2, ... leaves out
    return max(1, int((from_rank > relative_error**2 * from_rank[0]).sum()))


def rank_at_price(values: Tensor, price: float) -> int:
    """Return the rank r, 0 or more, that minimises ``price`` * r plus the sum of squares of the values left out.

    values: all singular values, descending. Each one pays for itself or not, whatever the others do.
    """
    return int((values.square() > price).sum())


def _exact_is_cheaper(m: int, n: int, r: int, excess: float) -> bool:
    """Compare operations: the Gram matrix and its eigenvectors against Krylov steps, one for each digit asked for.

    The factors before cubes were measured on LAPACK's eigensolver, whose operations are slower than a product's. They
    move the border between two right answers, so that another machine at worst loses some time there.
    """
    b = _block_columns(r)
    exact = 2 * m * n**2 + 18 * n**3
    steps = math.log10(1 / excess)
    krylov = (14 * m * n * b + 40 * (m + n) * b**2 + 900 * b**3) * steps / 3
    return steps * b > _LARGEST_BASIS * n or exact <= krylov


def _block_columns(r: int) -> int:
    return max(_FEWEST_COLUMNS, math.ceil((r + _SPARE_COLUMNS) / _COLUMN_STEP) * _COLUMN_STEP)


def _gram(tall: Tensor) -> Tensor:
    """tall.T @ tall: (n, n) float64."""
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for rows in _double_rows(tall):
        gram.addmm_(rows.T, rows)
    return gram


def _double_rows(tall: Tensor) -> Iterator[Tensor]:
    """Yield blocks of rows in float64: of a large embedding a whole copy would take more memory than all the rest."""
    for start in range(0, tall.shape[0], _ROWS_AT_ONCE):
        yield tall[start : start + _ROWS_AT_ONCE].double()


def _gram_subspace(tall: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the long images (m, r) of the r leading short vectors, and these (n, r): float64.

    In float32 where what is left out is far above its rounding errors, which takes half the time.
    """
    if tall.dtype == torch.float32 and r < tall.shape[1]:
        gram = tall.T @ tall
        short = symmetric_eigen(gram)[1][:, -r:].double()
        short = short @ _whitening(short.T @ short)
        images = (tall @ short.to(tall.dtype)).double()
        total = float(gram.diagonal().double().sum())
        if total - float(images.square().sum()) > _FLOAT32_DECOMPOSES * total:
            return images, short
    short = symmetric_eigen(_gram(tall))[1][:, -r:]
    return torch.cat([rows @ short for rows in _double_rows(tall)]), short


def _krylov_subspace(tall: Tensor, r: int, seed: int, excess: float) -> tuple[Tensor, Tensor] | None:
    """Return what _gram_subspace does, from a block Krylov space of tall.T @ tall; None if that would grow too large.

    ||A||^2 - ||A Q||^2 is the squared residual of a basis Q exactly, and costs nothing; each step adds a block to Q.
    """
    m, n = tall.shape
    columns = _block_columns(r)
    start = torch.randn(n, columns, generator=torch.Generator().manual_seed(seed)).to(tall)
    total = float(torch.linalg.vector_norm(tall, dim=1).double().square().sum())
    basis, images = tall.new_empty(n, 0), tall.new_empty(m, 0)  # (n, k) orthonormal; (m, k) = tall @ basis
    gram = tall.new_empty(0, 0, dtype=torch.float64)  # (k, k) = images.T @ images
    history: list[Tensor] = []
    block = tall.T @ (tall @ start)
    while True:
        block = _orthonormal_block(block, basis)
        image = tall @ block
        basis, images = torch.cat([basis, block], dim=1), torch.cat([images, image], dim=1)
        gram = _bordered(gram, (images.T @ image).double())
        squares, rotation = symmetric_eigen(gram)  # Ritz values: lower bounds of the r largest squares
        kept = torch.cat([squares.new_zeros(r), squares])[-r:].clamp_min(0)  # a basis of a low rank may be narrower
        residual = total - float(kept.sum())
        if tall.dtype == torch.float32 and residual < _FLOAT32_MEASURES * total:
            return _krylov_subspace(tall.double(), r, seed, excess)
        is_invariant = block.shape[1] == 0
        if is_invariant or residual <= (ABSOLUTE_EXCESS / 2) ** 2 * total:
            break
        if not history:
            # A random vector would have reached the mean of what is left: gains are counted from there.
            history.append(kept.clamp_max(residual / (n - r)))
        history.append(kept)
        if len(history) > 2 and _missing(history[-3:]) <= _SAFETY * 2 * excess * residual:
            break
        if basis.shape[1] + columns > _LARGEST_BASIS * n:
            return None
        block = tall.T @ image
    rotation = torch.cat([rotation.new_zeros(len(squares), r), rotation], dim=1)[:, -r:]
    return images.double() @ rotation, basis.double() @ rotation


def _missing(history: list[Tensor]) -> float:
    """Estimate how much the sum of the Ritz values would still gain, from their last three states: (r,) each.

    The gains of a Krylov space fall at least geometrically once they fall, but the ratio worsens while they do: the
    square root of the last ratio is used for all to come. Each value has a ratio of its own, because one that has
    long converged hides how slowly the others do.
    """
    before, gain = ((late - early).clamp_min(0) for early, late in pairwise(history))
    ratio = (gain / before.clamp_min(torch.finfo(gain.dtype).tiny)).sqrt().clamp_max(_SLOWEST)
    return float((gain * ratio / (1 - ratio)).sum())


def _orthonormal_block(block: Tensor, basis: Tensor) -> Tensor:
    """Return an orthonormal basis (n, at most b) of what ``block`` (n, b) adds to ``basis`` (n, k).

    By the float64 Gram matrix: a few large products, where QR would wait for its threads once a panel. Directions
    that are rounding noise are left out. Twice, because once leaves what the first rounding left; in float64, because
    making faint directions as long as the others lengthens the rounding errors in them as well.
    """
    noise = 10 * torch.finfo(block.dtype).eps
    fresh, known = block.double(), basis.double()
    for _ in range(2):
        before = torch.linalg.vector_norm(fresh, dim=0)
        fresh = fresh - known @ (known.T @ fresh)
        after = torch.linalg.vector_norm(fresh, dim=0)
        is_new = after > noise * before
        if not is_new.any():
            return block[:, :0]
        fresh = fresh[:, is_new] / after[is_new]
        fresh = fresh @ _whitening(fresh.T @ fresh)
    return fresh.to(block.dtype)


def _whitening(gram: Tensor) -> Tensor:
    """Return W (b, at most b) with W.T @ gram @ W the identity, without the directions that are rounding noise."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    if not failed and lower.diagonal().min().square() > _DEPENDENT:
        inverse: Tensor = torch.linalg.solve_triangular(lower, torch.eye(len(gram)).to(gram), upper=False)
        return inverse.T
    squares, vectors = symmetric_eigen(gram)
    is_independent = squares > _DEPENDENT * squares[-1]
    scaled: Tensor = vectors[:, is_independent] / squares[is_independent].sqrt()
    return scaled


def _bordered(gram: Tensor, border: Tensor) -> Tensor:
    """Return ``gram`` (k - b, k - b) grown by ``border`` (k, b) on the right and, transposed, below."""
    k, old = border.shape[0], gram.shape[0]
    grown = gram.new_empty(k, k)
    grown[:old, :old] = gram
    grown[old:, :old] = border[:old].T
    grown[:, old:] = border
    return grown


def _triplets(images: Tensor, short: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return long (m, r), values (r,) and short (n, r) vectors of images @ short.T, values descending: float64.

    images: (m, r); short: (n, r), orthonormal columns but for those that are zero.
    """
    squares, rotation = symmetric_eigen(images.T @ images)
    squares, rotation = squares.flip(0), rotation.flip(1)
    images, short = images @ rotation, short @ rotation
    if squares[-1] > _GRADED**2 * squares[0]:
        values = squares.sqrt()
        return images / values, values, short
    # Not ">=": a zero matrix comes here as well, and QR gives orthonormal vectors even for columns of zeros.
    long, long_core = torch.linalg.qr(images)
    short, short_core = torch.linalg.qr(short)
    u, values, vh = torch.linalg.svd(long_core @ short_core.T)
    return long @ u, values, short @ vh.T
