"""What a training loop needs beside its model: devices and processes, scores, losses, and where its state goes.

Several processes, as ``accelerate launch`` starts them, take the batches in turns, and have the mean of their
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import nn

from tcompress.errors import TaskError, UsageError
from tcompress.training.batches import seed_all
from tcompress.training.curves import Curves
from tcompress.training.factors import as_stored
from tcompress.training.history import Row
from tcompress.training.losses import naming
from tcompress.training.options import Defaults, TrainingOptions
from tcompress.training.sharding import require_whole_models
from tcompress.training.state import SavedState
from tcompress.training.watching import Watch
from tcompress.workflow.task import Task

try:
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import broadcast_object_list, send_to_device
except ImportError as error:
    raise ImportError(f"training needs accelerate ({error}): pip install 'tcompress[train]'") from error


_MEASURED = 8  # batches by which the loss is measured before it is made smaller


def make_accelerator(device: torch.device | None) -> Accelerator:
    """Return what knows devices and processes. device: None for what it finds.

    Raises UsageError for another one, and where Accelerate is to share a model out among processes.
    """
    require_whole_models()
    if device is not None and device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    on_cpu = device is not None and device.type == "cpu"
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    try:
        # Parameters are float32 and scores are told in float32: autocast is this file's, and the loss's alone.
        return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    except ValueError as error:
        raise UsageError("this process has trained on another device; start a new one for --device") from error


class Engine:
    """Everything that a training loop needs beside its model and its objective.

    saved: where the state goes. tell: is given all rows after every epoch, in the main process.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        task: Task,
        options: TrainingOptions,
        defaults: Defaults,
        saved: SavedState,
        tell: Callable[[Sequence[Row]], None],
        watch: Watch,
        curves: Curves,
    ) -> None:
        self.accelerator, self.task, self.options, self.defaults = accelerator, task, options, defaults
        self.saved, self.tell, self.watch, self.curves = saved, tell, watch, curves

    @property
    def epochs(self) -> int | None:
        """Epochs at most; None where steps alone were asked for."""
        if self.options.epochs is None and self.options.steps is not None:
            return None
        return self.options.epochs or self.defaults.epochs

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the scores of a model as it would be stored, the same ones in every process."""
        scores: list[dict[str, float] | None] = [None]
        if self.accelerator.is_main_process:
            with as_stored(model):
                scores = [self.evaluate_alone(model)]
        broadcast_object_list(scores)
        assert scores[0] is not None, "the main process has sent them"  # noqa: S101
        return scores[0]

    def mean_loss(self, model: nn.Module) -> float:
        """Return the task's mean loss on the first batches of an epoch, the same figure in every process.

        Raises TaskError when the task's code fails, SafetyError when the memory is not enough.
        """
        model.eval()
        seed_all(self.options.seed, 1)
        losses = []
        for number, batch in enumerate(islice(self.task.train_batches(), _MEASURED), start=1):
            with naming(self.task, f"batch {number}, before the first step", batch), torch.no_grad():
                losses.append(self.task.loss(model, send_to_device(batch, self.accelerator.device)).detach().float())
        if not losses:
            raise TaskError("train_batches gives no batch", path=self.task.path)
        return float(self.accelerator.reduce(torch.stack(losses).mean(), "mean"))

    def evaluate_alone(self, model: nn.Module) -> dict[str, float]:
        """Return the scores of a model as it is, in this process."""
        model.eval()
        seed_all(self.options.seed, 0)
        with torch.inference_mode():
            return self.task.evaluate(model)
