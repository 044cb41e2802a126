"""How long a way through a layer takes, in multiplications of a large dense product: what choosing one rests on.

Letters: n = positions at once: rows of the input, or for a convolution batch times output positions. The constants were
fitted to `tests/benchmarks/runtime.py` on a CPU.
"""

from __future__ import annotations

CALL = 200_000.0  # a call into the library, however small its operands
_READ = 8.0  # a weight is read once, which costs as much as multiplying it so often
_READ_ALONE = 5.0  # with one position there is nothing else to do
_SPARSE_CALLS = 3  # what a product with compressed rows takes before it starts, in calls
_SPARSE_ALONE = 35.0  # a nonzero for one position
_SPARSE_READ = 30.0
_SPARSE = 4.0  # and for each of many; more when their inputs no longer stay in the cache
_SPARSE_MANY = 6.0
_MANY = 96
_LEARNING_CALLS = 6  # more of them, where gradients are wanted too
_TURNED = 50.0  # a value of input or output, which compressed rows want the other way round
_ADDED = 25.0  # a value of input or output, where the ways through two parts are added


def dense_effort(weights: float, n: int, *, calls: int = 1) -> float:
    """Return the effort of dense products with so many weights altogether."""
    return calls * CALL + weights * (_READ_ALONE if n < 2 else _READ + n)


def sparse_effort(nonzeros: int, n: int) -> float:
    """Return the effort of a product with compressed rows."""
    if n < 2:
        return _SPARSE_CALLS * CALL + nonzeros * _SPARSE_ALONE
    return _SPARSE_CALLS * CALL + nonzeros * (_SPARSE_READ + (_SPARSE if n < _MANY else _SPARSE_MANY) * n)


def learning_rows_effort(nonzeros: int, sizes: int, n: int) -> float:
    """Return the effort of one of the three products of a training step. sizes: inputs and outputs together."""
    return sparse_effort(nonzeros, n) + _LEARNING_CALLS * CALL + _TURNED * sizes * n


def adding_effort(sizes: int, n: int) -> float:
    """Return the effort of adding what two parts make of an input, and their gradients. sizes: as above."""
    return _ADDED * sizes * n
