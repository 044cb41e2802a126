"""The type that a model computes in, where transformers would say the type that factors are stored in.

A PreTrainedModel takes the type of its first parameter for its own, and casts inputs and masks to it. Factors may be
stored in half a type and compute in a whole one, so such models get a class that looks at the layers instead.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tcompress.runtime.modules import Factorized


def correct(model: nn.Module) -> None:
    """Let all models inside a model, itself included, name the type that they compute in."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.dtype != computing_type(part):
            kind: Any = type(part)
            part.__class__ = _corrected(kind)


def computing_type(model: nn.Module) -> torch.dtype:
    """Return the type of the first layer: of the dense weight, where it is stored as factors."""
    for module in model.modules():
        if isinstance(module, Factorized):
            return module.like.dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()


@cache
def _corrected(model: Any) -> type[Any]:
    """Return the class that goes by the same name; its instances are copied and pickled as what they are."""
    rest = {
        "__module__": model.__module__,
        "__qualname__": model.__qualname__,
        "__doc__": model.__doc__,
        "__reduce_ex__": lambda self, _: (_bare, (model,), self.__dict__),
        "dtype": property(computing_type),
    }
    return type(model.__name__, (model,), rest)


def _bare(model: Any) -> Any:
    return object.__new__(_corrected(model))
