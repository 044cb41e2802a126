"""Factors while they are trained: float32 values that learn, in the places that they have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tcompress.encodings import Coding
from tcompress.formats.base import Shape
from tcompress.formats.pattern import Pattern
from tcompress.runtime.packed import Maker


class Learning(Maker):
    """One factor whose values learn in float32, whatever they are stored as; its zeros stay where they are.

    factor: of any floating type. dtype: the type that it is stored in; codes have one of their own. coding: what it was
    read from, None for a plain tensor. fixed: whether the elements that are zero are no parameters but stay zero.
    """

    places: Tensor | None  # (values,), the row-major positions of the values between the zeros

    def __init__(self, factor: Tensor, dtype: torch.dtype, coding: Coding | None, *, fixed: bool) -> None:
        super().__init__()
        self.shape: Shape = tuple(factor.shape)
        self.dtype, self.coding = dtype, coding
        flat = factor.detach().to(torch.float32).reshape(-1)
        places = flat.nonzero()[:, 0] if fixed else None
        is_full = places is None or len(places) == len(flat)
        self.register_buffer("places", None if is_full else places, persistent=False)
        values = flat.reshape(self.shape) if is_full or places is None else flat[places]
        self.values = nn.Parameter(values.clone())
        self._pattern: Pattern | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is stored by a support."""
        return self.coding is not None and bool(self.coding.support.part_names)

    def forward(self) -> Tensor:
        """Return the factor, with gradients for its values."""
        return self.pattern().dense(self.values).reshape(self.shape) if self.is_placed else self.values

    @property
    def is_placed(self) -> bool:
        return self.places is not None

    def pattern(self) -> Pattern:
        assert self.places is not None, "asked for only where it is placed"  # noqa: S101
        if self._pattern is None or self._pattern.flat is not self.places:  # of another device, or given anew
            self._pattern = Pattern(self.places, (self.shape[0], math.prod(self.shape[1:])))
        return self._pattern

    def at_places(self) -> Tensor:
        return self.values


class Pruned(Learning):
    """A sparse factor that is full at first, and loses values while it learns (low-rank-plus-sparse paper, 2.3).

    factor, dtype, coding: as of ``Learning``. planned: how many values are to be left in the end.
    """

    mask: Tensor  # bool, of the factor's shape: what is kept; in the state dict, so that a run can go on

    def __init__(self, factor: Tensor, dtype: torch.dtype, coding: Coding | None, *, planned: int) -> None:
        super().__init__(factor, dtype, coding, fixed=False)
        self.planned = planned
        self.register_buffer("mask", torch.ones_like(self.values, dtype=torch.bool))

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def kept(self) -> int:
        """How many values the mask keeps."""
        return int(self.mask.sum())

    def forward(self) -> Tensor:
        # Not a product, which makes -0.0 of negative values: encodings would store it.
        return self.values.masked_fill(~self.mask, 0.0)
