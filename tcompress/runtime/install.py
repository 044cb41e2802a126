"""From a torch model's layers to factorised ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tcompress.formats import Format
from tcompress.formats.base import Factorization
from tcompress.runtime.modules import Factorized, FactorizedConv, FactorizedEmbedding, FactorizedLinear, Origin

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def obstacle(layer: nn.Module, attribute: str) -> str | None:
    """Return why a layer's tensor cannot be replaced by factors; None when it can."""
    if attribute != "weight":
        return f"{attribute} is no layer's weight"
    for kind in (nn.Linear, nn.Embedding, *_CONVOLUTIONS):
        if isinstance(layer, kind):
            if type(layer).forward is not kind.forward:
                return f"{type(layer).__name__} has a forward of its own"
            if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
                return "its rows are changed whenever they are used (max_norm)"
            if isinstance(layer, nn.Embedding) and layer.sparse:
                return "its gradients are sparse"
            return None
    return f"{type(layer).__name__} is neither a linear layer nor a convolution nor an embedding"


def factorized(
    layer: nn.Module, factors: Factorization, setting: Format, *, like: Tensor, cache: str, origin: Origin | None
) -> Factorized:
    """Return the layer that takes the place of one without obstacles. like: tells the type and the device."""
    rest: dict[str, Any] = {"like": like, "cache": cache, "origin": origin}
    found: Factorized
    if isinstance(layer, nn.Embedding | FactorizedEmbedding):
        found = FactorizedEmbedding(factors, setting, padding_idx=layer.padding_idx, **rest)
    elif isinstance(layer, (*_CONVOLUTIONS, FactorizedConv)):
        found = FactorizedConv(factors, setting, layer=layer, **rest)
    else:
        assert isinstance(layer, nn.Linear | FactorizedLinear)  # noqa: S101
        found = FactorizedLinear(factors, setting, bias=layer.bias, **rest)
    return found.train(layer.training)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in its place in the model. name: of the module, with dots."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def collect(model: nn.Module) -> dict[str, Factorized]:
    """Return the factorised layers of a model by the names of their weights, ties included."""
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Factorized)
    }
