"""What is in a batch, and in what a model gives: tensors in tuples, lists and mappings, and how many samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield all tensors in tuples, lists and mappings, which what transformers gives is as well."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def outputs_in(value: Any) -> list[Tensor]:
    """Return the tensors of floating types in what a model gives, without gradients."""
    return [tensor.detach() for tensor in tensors_in(value) if tensor.is_floating_point()]


def samples_in(batch: Any) -> int:
    """Return the first size of a batch's first tensor, 1 where none has sizes."""
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim > 0), 1)


def first_samples(batches: Sequence[Any], enough: int) -> list[Any]:
    """Return the first batches that have enough samples together."""
    chosen: list[Any] = []
    samples = 0
    for batch in batches:
        if samples >= enough:
            break
        chosen.append(batch)
        samples += samples_in(batch)
    return chosen
