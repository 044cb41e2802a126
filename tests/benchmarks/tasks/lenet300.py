"""Task: MNIST LeNet-300-100, for models/lenet300.safetensors.

The data are in ../shared/data beside the checkout, or where TCOMPRESS_DATA says; TCOMPRESS_SCORED limits the digits
that are scored.
"""

from __future__ import annotations

import functools
import os
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SETS = Path(os.environ.get("TCOMPRESS_DATA", Path(__file__).parents[4] / "shared" / "data")) / "sets"
SCORED = int(os.environ.get("TCOMPRESS_SCORED", "0")) or None
SIZES = (784, 300, 100, 10)
CALIBRATED, BATCH = 2000, 200
TRAINED = 128  # digits in a batch


class LeNet300(nn.Module):
    """Three linear layers with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Module()
        for number, (inputs, outputs) in enumerate(pairwise(SIZES)):
            self.output.add_module(f"compressible_{number}", nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 10) of digits (batch, 784)."""
        first, second, last = self.output.children()
        return last(second(first(x).tanh()).tanh())


def pixels(digits: np.ndarray) -> Tensor:
    """Return digits (count, 28, 28) of bytes as inputs of the model, which wants the mean digit taken off."""
    mean = np.load(SETS / "mnist_train_mean.npy")
    return torch.from_numpy(digits.reshape(len(digits), -1).astype(np.float32) / 255 - mean)


@functools.cache
def test_set() -> tuple[Tensor, Tensor]:
    """Return the digits that are scored, and what they are; read once in a process."""
    with np.load(SETS / "mnist_test.npz") as stored:
        return pixels(stored["x"][:SCORED]), torch.from_numpy(stored["y"][:SCORED])


def model() -> nn.Module:
    """Return the architecture."""
    return LeNet300()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the percentage of test digits that are read right."""
    inputs, classes = test_set()
    device = next(chain(model.parameters(), model.buffers())).device
    with torch.inference_mode():
        found = torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in inputs.split(2000)])
    return {"accuracy": 100 * float((found == classes).double().mean())}


def calibration_batches() -> list[Tensor]:
    """Return training digits."""
    with np.load(SETS / "mnist_train.npz") as stored:
        return list(pixels(stored["x"][:CALIBRATED]).split(BATCH))


@functools.cache
def train_set() -> tuple[Tensor, Tensor]:
    """Return the digits to learn from, and what they are; read once in a process."""
    with np.load(SETS / "mnist_train.npz") as stored:
        return pixels(stored["x"]), torch.from_numpy(stored["y"])


def train_batches() -> list[tuple[Tensor, Tensor]]:
    """Return all training digits, in another order each time."""
    inputs, classes = train_set()
    return [(inputs[chosen], classes[chosen]) for chosen in torch.randperm(len(classes)).split(TRAINED)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy."""
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)
