"""Task: MNIST by one wide hidden layer, which is to be a tensor-train layer, for the slides' table.

The slides do not say the network. Their compression rates are those of four cores on a layer of 784 inputs and 3136
units, to 2 %. The epoch is chosen by digits that are held out of the training set; ``:TestSet`` scores the test set.

The data are in ../shared/data beside the checkout, or where TCOMPRESS_DATA says.
"""

from __future__ import annotations

import functools
import os
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SETS = Path(os.environ.get("TCOMPRESS_DATA", Path(__file__).parents[4] / "shared" / "data")) / "sets"
INPUTS, UNITS, CLASSES = 784, 3136, 10
HELD_OUT = 5000  # of the training digits, the last ones
TRAINED = 128  # digits in a batch


class Wide(nn.Module):
    """A hidden layer, and a dense one that reads it out."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(INPUTS, UNITS)
        self.output = nn.Linear(UNITS, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 10) of digits (batch, 784)."""
        return self.output(self.hidden(x).relu())


@functools.cache
def digits(which: str) -> tuple[Tensor, Tensor]:
    """Return the digits of ``train`` or ``test``, (count, 784) from 0 to 1, and what they are; read once."""
    # Tensors of inference mode, in which they may be asked for first, could not be trained with.
    with np.load(SETS / f"mnist_{which}.npz") as stored, torch.inference_mode(False):
        images = stored["x"].reshape(len(stored["x"]), -1).astype(np.float32) / 255
        return torch.from_numpy(images), torch.from_numpy(stored["y"])


def model() -> nn.Module:
    """Return the architecture."""
    return Wide()


def train_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the digits that are not held out, in another order each time."""
    inputs, classes = digits("train")
    order = torch.randperm(len(classes) - HELD_OUT)
    return [(inputs[chosen], classes[chosen]) for chosen in order.split(TRAINED)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy."""
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the part of the held-out digits that is read right."""
    inputs, classes = digits("train")
    return {"accuracy": _read_right(model, inputs[-HELD_OUT:], classes[-HELD_OUT:])}


class TestSet:
    """The task that scores the test set: for what is trained."""

    @staticmethod
    def model() -> nn.Module:
        """Return the architecture."""
        return model()

    @staticmethod
    def evaluate(model: nn.Module) -> dict[str, float]:
        """Return the part of the test digits that is read right."""
        return {"accuracy": _read_right(model, *digits("test"))}


def _read_right(model: nn.Module, inputs: Tensor, classes: Tensor) -> float:
    device = next(chain(model.parameters(), model.buffers())).device
    with torch.inference_mode():
        found = torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in inputs.split(1000)])
    return float((found == classes).double().mean())
