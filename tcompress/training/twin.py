"""A dense weight that learns, and the factors that stand for it whenever the model is scored or written."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.formats import Format
from tcompress.formats.base import Factorization
from tcompress.runtime.packed import Packed
from tcompress.workflow.fitting import stored_factors
from tcompress.workflow.stored import StoredFactor, rebuild


class Twin(Factorization):
    """In a layer's place for factors it runs the dense weight; ``held`` gives what it is as it would be stored.

    weight: the dense weight, float32 or float64, a parameter. planned: the format. factors: as it fits them, before
    they are rounded; they do not learn. store: the type that they are stored in. is_free: whether how much is kept may
    come to differ from what ``planned`` says. multiplier: Lagrange multipliers of weight = compressed weight, of the
    weight's shape.

    All that changes is in the state dict, factors with whatever ranks they have.
    """

    weight: nn.Parameter
    multiplier: Tensor
    factors: Factorization

    def __init__(
        self, weight: Tensor, planned: Format, factors: Factorization, store: torch.dtype, *, is_free: bool
    ) -> None:
        super().__init__()
        self.shape = tuple(weight.shape)
        self.planned, self.store, self.is_free = planned, store, is_free
        self.weight = nn.Parameter(weight.detach().clone())
        self.register_buffer("multiplier", torch.zeros_like(self.weight))
        self.take(factors)

    def reconstruct(self) -> Tensor:
        return self.weight

    def take(self, factors: Factorization) -> None:
        """Let other factors stand for the weight."""
        self.factors = factors.to(self.weight.device).requires_grad_(False)

    @property
    def setting(self) -> Format:
        """The format, with the amount that the factors have where that is free."""
        return self.planned.sized_as(self.factors) if self.is_free else self.planned

    def compressed(self) -> Tensor:
        """Return the weight that the factors give as they would be stored. Raises NumericalError where they cannot."""
        factors = {name: factor.values for name, factor in self.stored().items()}
        device, dtype = self.weight.device, self.weight.dtype
        return rebuild(self.planned, self.shape, factors, dtype=dtype, device=device).to(device)

    def held(self) -> dict[str, nn.Parameter | Packed]:
        """Return what holds each factor as it would be stored. Raises as ``compressed``."""
        return {
            name: nn.Parameter(factor.parts[""])
            if factor.coding.is_plain_tensor
            else Packed(factor.coding, factor.parts, tuple(factor.spec.shape))
            for name, factor in self.stored().items()
        }

    def stored(self) -> Mapping[str, StoredFactor]:
        """Return each factor as it would be stored. Raises NumericalError where it cannot."""
        return stored_factors(dict(self.factors.state_dict()), self.planned, self.shape, self.store)

    def _load_from_state_dict(self, state_dict: MutableMapping[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for factors of the ranks that come, which are then loaded as those of any module."""
        start = f"{prefix}factors."
        found = {name.removeprefix(start): each for name, each in state_dict.items() if name.startswith(start)}
        self.take(self.planned.load(self.shape, {name: torch.empty_like(each) for name, each in found.items()}))
        super()._load_from_state_dict(state_dict, prefix, *rest)
