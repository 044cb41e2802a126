"""A random order of so many things that a seed alone tells, today and in ten years."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def permutation(count: int, seed: int) -> Tensor:
    """Return the numbers 0..count-1 in random order: (count,) int64.

    NumPy's RandomState: its stream is frozen (NEP 19), that of newer generators may change with the version.
    """
    return _permutation(count, seed)


# What torch.compiler.assume_constant_result sets: a compiler cannot look into NumPy. That function loads the compiler.
permutation._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=2)  # a layer is shuffled and unshuffled again and again, one layer at a time
def _permutation(count: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).permutation(count))


def shuffled(tensor: Tensor, seed: int) -> Tensor:
    """Return the same entries in random order, in the same shape: entry k is entry permutation[k] of the original."""
    return tensor.reshape(-1)[permutation(tensor.numel(), seed).to(tensor.device)].reshape(tensor.shape)


def unshuffled(tensor: Tensor, seed: int) -> Tensor:
    """Undo ``shuffled``."""
    order = permutation(tensor.numel(), seed).to(tensor.device)
    return torch.empty_like(tensor.reshape(-1)).index_copy(0, order, tensor.reshape(-1)).reshape(tensor.shape)
