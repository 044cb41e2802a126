"""Modules in the place of factorised layers, for a model that is to be exported."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tcompress.runtime.modules import Factorized


class Stand(nn.Sequential):
    """Layers in the place of one, whose other attributes it lends to code that asks, as attention does for weight."""

    def __init__(self, parts: Mapping[str, nn.Module], layer: Factorized) -> None:
        super().__init__(OrderedDict(parts))
        self._stands_for = (layer,)  # in a tuple: its parameters are not to be exported

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_stands_for":
                raise
            return getattr(self._stands_for[0], name)


class Terms(Stand):
    """A sum of layers."""

    def __init__(self, terms: Iterable[nn.Module], layer: Factorized) -> None:
        super().__init__({}, layer)
        self.terms = nn.ModuleList(terms)

    def forward(self, x: Tensor) -> Tensor:
        """Map what each of the layers takes."""
        first, *others = (term(x) for term in self.terms)
        total: Tensor = sum(others, first)
        return total


class SharedByGroups(nn.Module):
    """A grouped convolution whose first layers are the same for all groups: these become batch entries meanwhile."""

    def __init__(self, groups: int, shared: nn.Module, out_map: nn.Module) -> None:
        super().__init__()
        self.groups, self.shared, self.out_map = groups, shared, out_map

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, *sizes) to (batch, out, *sizes)."""
        inner = self.shared(x.reshape(-1, x.shape[1] // self.groups, *x.shape[2:]))
        whole: Tensor = self.out_map(inner.reshape(-1, self.groups * inner.shape[1], *inner.shape[2:]))
        return whole


class Padding(nn.Module):
    """Pads as a convolution does whose padding_mode is another than zeros."""

    def __init__(self, sizes: list[int], mode: str) -> None:
        super().__init__()
        self.sizes, self.mode = sizes, mode

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, *sizes) to larger sizes."""
        return F.pad(x, self.sizes, mode=self.mode)
