"""Factors while they are trained: float32 values that learn, in the places that they have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tcompress.encodings import Coding, Levels
from tcompress.formats.base import Shape
from tcompress.formats.pattern import Pattern
from tcompress.runtime.packed import Maker


class Learning(Maker):
    """One factor whose values learn in float32, whatever they are stored as; its zeros stay where they are.

    factor: of any floating type. dtype: the type that it is stored in; codes have one of their own. coding: what it was
    read from, None for a plain tensor. fixed: whether the elements that are zero are no parameters but stay zero.
    parts: what lies on disk of the factor as it is, where these are codes.
    """

    places: Tensor | None  # (values,), the row-major positions of the values between the zeros
    steps: Tensor | None  # as the values: how far apart the codes are that each is stored as; None without codes
    shift: Tensor  # () of ``levels``; both are in the state dict, so that a run can go on

    def __init__(
        self,
        factor: Tensor,
        dtype: torch.dtype,
        coding: Coding | None,
        *,
        fixed: bool,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.shape: Shape = tuple(factor.shape)
        self.dtype, self.coding, self.parts = dtype, coding, parts
        flat = factor.detach().to(torch.float32).reshape(-1)
        places = flat.nonzero()[:, 0] if fixed else None
        is_full = places is None or len(places) == len(flat)
        self.register_buffer("places", None if is_full else places, persistent=False)
        values = flat.reshape(self.shape) if is_full or places is None else flat[places]
        self.values = nn.Parameter(values.clone())
        self._pattern: Pattern | None = None
        self.levels: Levels | None = None
        self.is_rounded = True  # where it has levels; what is not yet as it will be stored may wait
        self.register_buffer("steps", None)
        self.register_buffer("shift", None)

    @property
    def is_sparse(self) -> bool:
        """Whether it is stored by a support."""
        return self.coding is not None and bool(self.coding.support.part_names)

    def forward(self) -> Tensor:
        """Return the factor, with gradients for its values."""
        return self._whole(self._as_coded())

    def learnt(self) -> Tensor:
        """Return the factor of the values as they are, whatever they are coded as."""
        return self._whole(self.values)

    def see_codes(self, steps: Tensor, levels: Levels) -> None:
        """Be from now on what the codes nearest to the values stand for; gradients pass to the values as they are.

        steps: of the factor's shape, 0 where nothing is stored. Y. Bengio, N. Leonard, A. Courville, "Estimating or
        propagating gradients through stochastic neurons", 2013: the straight-through estimator.
        """
        flat = steps.reshape(-1)
        own = flat if self.places is None else flat[self.places.to(flat.device)]
        self.steps = own.reshape(self.values.shape).to(self.values)
        self.shift = torch.tensor(levels.shift, dtype=torch.float32, device=self.values.device)
        self.levels = levels

    def _as_coded(self) -> Tensor:
        if self.steps is None or self.levels is None or not self.is_rounded:
            return self.values
        with torch.no_grad():
            coded = self.levels.nearest(self.values, self.steps, self.shift)
        return self.values + (coded - self.values).detach()

    def _whole(self, values: Tensor) -> Tensor:
        return self.pattern().dense(values).reshape(self.shape) if self.is_placed else values

    @property
    def is_placed(self) -> bool:
        return self.places is not None

    def pattern(self) -> Pattern:
        assert self.places is not None, "asked for only where it is placed"  # noqa: S101
        if self._pattern is None or self._pattern.flat is not self.places:  # of another device, or given anew
            self._pattern = Pattern(self.places, (self.shape[0], math.prod(self.shape[1:])))
        return self._pattern

    def at_places(self) -> Tensor:
        return self._as_coded()


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

    def _whole(self, values: Tensor) -> Tensor:
        # Not a product, which makes -0.0 of negative values: encodings would store it.
        return values.masked_fill(~self.mask, 0.0)
