"""The checkpoints of a run as models on its device: the one that learns, the dense one, the one that was written."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import Checkpoint
from tcompress.runtime.install import collect
from tcompress.training.factors import let_learn
from tcompress.workflow.loading import load_into, load_state_dict
from tcompress.workflow.resaving import kept_dense
from tcompress.workflow.task import Task


@dataclass(frozen=True)
class Models:
    """The checkpoints of a run, and how they become models."""

    checkpoint: Checkpoint
    task: Task
    strip_prefix: str
    device: torch.device

    def learning(self) -> tuple[nn.Module, list[str]]:
        """Return the model that learns, and what it must leave as it is."""
        made = self.task.model()
        frozen = {name for name, each in made.named_parameters(remove_duplicate=False) if not each.requires_grad}
        model = self._loaded(made, self.checkpoint)
        kept = kept_dense(model, self.checkpoint, strip_prefix=self.strip_prefix)
        for name in kept:
            model.get_parameter(name).requires_grad_(False)
        let_learn(model, frozen)
        return _as_float32(model).to(self.device), kept

    def dense(self, checkpoint: Checkpoint) -> nn.Module:
        """Return the model with a dense checkpoint's weights, which do not learn."""
        model = self.task.model()
        load_state_dict(checkpoint, model, strip_prefix=self.strip_prefix)
        return _as_float32(model).to(self.device).eval().requires_grad_(False)

    def written(self, path: Path) -> nn.Module:
        """Return the model as it will be loaded from what was written."""
        with open_checkpoint(path) as checkpoint:
            model = self._loaded(self.task.model(), checkpoint)
        return _as_float32(model).to(self.device).eval()

    def _loaded(self, model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is loaded dense: ")  # the result's notes say it
            return load_into(model, checkpoint, strip_prefix=self.strip_prefix)


def _as_float32(model: nn.Module) -> nn.Module:
    """Return a model of short floating numbers in float32: a step is often smaller than what they can tell apart."""
    types = {each.dtype for each in model.parameters()} | {each.like.dtype for each in collect(model).values()}
    return model.float() if types & {torch.bfloat16, torch.float16} else model
