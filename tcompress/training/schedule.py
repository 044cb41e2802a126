"""How parameters are changed, and how fast: by the task's optimizer and scheduler, or AdamW, a warm-up and a cosine."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from tcompress.errors import UsageError
from tcompress.workflow.task import Task

_WARM_UP = 0.05  # of all steps


def make_optimizer(task: Task, parameters: list[nn.Parameter], lr: float | None, default_lr: float) -> Optimizer:
    """Return the task's optimizer, or AdamW. Raises UsageError where a rate is given and the task says its own."""
    if not task.has("optimizer"):
        # No decay: factors are near a good model already, and zero is not where that is.
        return AdamW(parameters, lr=default_lr if lr is None else lr, weight_decay=0.0)
    if lr is not None:
        raise UsageError("its optimizer(parameters) says the learning rate; leave out --lr", path=task.path)
    return task.optimizer(parameters)


def make_scheduler(task: Task, optimizer: Optimizer, rate: Callable[[int], float]) -> LRScheduler:
    """Return the task's scheduler; for the default optimizer the method's rate at each step; else a constant one."""
    if task.has("scheduler"):
        return task.scheduler(optimizer)
    if task.has("optimizer"):
        return LambdaLR(optimizer, lambda _: 1.0)
    return LambdaLR(optimizer, rate)


def cosine(step: int, steps: int) -> float:
    """Return the part of the highest rate that step ``step``, the first being 0, of so many learns with."""
    rising = max(1, round(_WARM_UP * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising))))
