"""The user's batches: how many there are, and which of them each process takes for each step.

Any iterable will do, so nothing is known of what is in a batch. The same seed is set before each pass, which makes a
pass that is begun again after a stop give the same batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tcompress.errors import TaskError, UsageError
from tcompress.workflow.task import Task

_MOST_COUNTED = 1_000_000
_EPOCH_SEEDS = 1_000_003  # a prime: seeds of different runs and epochs seldom meet


def seed_all(seed: int, epoch: int) -> None:
    """Seed every generator that a task may draw from."""
    mixed = (seed * _EPOCH_SEEDS + epoch) % 2**32
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def count_batches(task: Task, seed: int) -> int:
    """Return the number of batches of a pass; what cannot say it is gone through once.

    Raises TaskError when there are none, UsageError where they do not end.
    """
    count = task.batch_count()
    if count is None:
        seed_all(seed, 1)
        count = 0
        for _ in task.train_batches():
            count += 1
            if count > _MOST_COUNTED:
                problem = (
                    f"{task.batches} gives more than {_MOST_COUNTED} batches; say with --steps how many are enough"
                )
                raise UsageError(problem, path=task.path)
    if count == 0:
        raise TaskError(f"{task.batches} gives no batch", path=task.path)
    return count


def steps_in(batches: int, processes: int, accumulate: int) -> int:
    """Return how many steps a pass over so many batches makes."""
    return -(-(batches // processes) // accumulate)


def for_steps(batches: Iterable[Any], processes: int, process: int, accumulate: int) -> Iterator[list[Any]]:
    """Yield the batches that one of several processes takes for each step.

    Batches are dealt out in turns; a last round that does not reach all processes is left out, for each of them must
    make as many steps as the others. The last step of a pass may have fewer than ``accumulate``.
    """
    dealt: list[Any] = []
    own: list[Any] = []
    for batch in batches:
        dealt.append(batch)
        if len(dealt) == processes:
            own.append(dealt[process])
            dealt = []
        if len(own) == accumulate:
            yield own
            own = []
    if own:
        yield own


def samples_in(batch: Any) -> int | None:
    """Return the size of a batch: the first dimension of the first tensor in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    values = list(batch.values()) if hasattr(batch, "values") else batch
    for value in values if isinstance(values, list | tuple) else ():
        if (found := samples_in(value)) is not None:
            return found
    return None
