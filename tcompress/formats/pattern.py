"""Sparse factors that learn: values at places that stay, without a dense weight where that is sooner.

Letters: k = values; out, in as in base; n = rows of the input. A training step takes three products with a matrix S:
x ST, its gradient's G S, and GT x at the places alone. As compressed rows they take the time of a dense product times
some six times the density.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from tcompress.formats.compressed import announce_once, can_run
from tcompress.formats.effort import learning_rows_effort

_AT_ONCE = 256  # rows of an input: what they make stays in the cache until it is turned


class Pattern:
    """Where the values of a matrix (out, in) stand. flat: (k,), their row-major positions, ascending, all different."""

    def __init__(self, flat: Tensor, shape: tuple[int, int]) -> None:
        self.flat, self.shape = flat, shape

    def dense(self, values: Tensor) -> Tensor:
        """Return the matrix of these values, (k,), with gradients for them."""
        # The positions are all different, so that the result does not hang on an order.
        return values.new_zeros(math.prod(self.shape)).index_copy_(0, self.flat, values).reshape(self.shape)

    def rows(self, values: Tensor) -> Tensor:
        """Return the matrix of these values as compressed rows, without gradients."""
        return _compressed(*self._by_rows, values, self.shape)

    def turned_rows(self, values: Tensor) -> Tensor:
        """Return the transpose of that matrix as compressed rows of its own."""
        starts, columns, order = self._by_columns
        return _compressed(starts, columns, values.index_select(0, order), (self.shape[1], self.shape[0]))

    def suits(self, x: Tensor, values: Tensor) -> bool:
        """Tell whether products with compressed rows can be had for this input; they are measured on the CPU alone."""
        return (
            can_run(values)
            and x.device.type == values.device.type == "cpu"
            and x.dtype == values.dtype
            and x.numel() > 0
            and len(self.flat) > 0
            and not torch.is_autocast_enabled("cpu")  # it asks for types that have no such product
        )

    def effort(self, n: int) -> float:
        """Return how long compressed rows take for n rows of input, in the unit of ``effort.py``."""
        return learning_rows_effort(len(self.flat), sum(self.shape), n)

    def linear(self, x: Tensor, values: Tensor) -> Tensor:
        """Return ``x @ matrix.T`` through compressed rows, for x: (..., in) that ``suits``, with gradients."""
        found: Tensor = _Linear.apply(x.reshape(-1, self.shape[1]), values, self)  # type: ignore[no-untyped-call]
        return found.reshape(*x.shape[:-1], self.shape[0])

    @cached_property
    def _by_rows(self) -> tuple[Tensor, Tensor]:
        """Starts of the rows, and columns, as 32-bit numbers: those of 64 bits lose a third of the speed."""
        out, in_ = self.shape
        return _starts(self.flat // in_, out), (self.flat % in_).to(torch.int32)

    @cached_property
    def _by_columns(self) -> tuple[Tensor, Tensor, Tensor]:
        """Starts of the columns, rows, and which value stands there."""
        in_ = self.shape[1]
        columns, order = torch.sort(self.flat % in_, stable=True)
        return _starts(columns, in_), (self.flat // in_)[order].to(torch.int32), order.to(torch.int32)


class _Linear(torch.autograd.Function):
    """x ST for x: (n, in), values of S: (k,). A second derivative is refused, not wrong."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, values: Tensor, pattern: Pattern) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern  # type: ignore[attr-defined]
        return _times(pattern.rows(values), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        of_x = _times(ctx.pattern.turned_rows(values), gradient) if ctx.needs_input_grad[0] else None
        of_values = _at_places(ctx.pattern, gradient, x) if ctx.needs_input_grad[1] else None
        return of_x, of_values, None


def _times(rows: Tensor, x: Tensor) -> Tensor:
    """Return ``x @ rows.T``, some rows of x: (n, in) after the others."""
    result = x.new_empty(len(x), rows.shape[0])
    for part, answer in zip(torch.split(x, _AT_ONCE), torch.split(result, _AT_ONCE), strict=True):
        answer.copy_((rows @ part.T).T)
    return result


def _at_places(pattern: Pattern, left: Tensor, right: Tensor) -> Tensor:
    """Return the values of ``left.T @ right`` at the places; left: (n, out), right: (n, in)."""
    found = pattern.rows(left.new_zeros(len(pattern.flat)))
    for part, other in zip(torch.split(left, _AT_ONCE), torch.split(right, _AT_ONCE), strict=True):
        found = torch.sparse.sampled_addmm(found, part.T, other)
    return found.values()


def _compressed(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    announce_once()
    return torch.sparse_csr_tensor(starts, columns, values.detach(), shape, check_invariants=False)


def _starts(sorted_rows: Tensor, count: int) -> Tensor:
    """Return where each of ``count`` rows begins, and the end: (count + 1,)."""
    counts = torch.bincount(sorted_rows, minlength=count)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


Patterns = Mapping[str, Callable[[], Pattern]]  # by the name of the factor; asked for when they are needed


def rows_in(x: Tensor) -> int:
    """Return how many inputs x: (..., in) has."""
    return math.prod(x.shape[:-1])
