"""Task: the ResNet-8 of MLPerf Tiny on CIFAR-10, for models/resnet8_cifar10.safetensors, with Keras's names.

The data are those of resnet20; this model takes pixels from 0 to 255 as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from resnet20 import BATCH, CALIBRATED, SCORED, SETS, accuracy, pictures
from torch import Tensor, nn

SIZES = ((3, 16, 3, 1), (16, 16, 3, 1), (16, 16, 3, 1), (16, 32, 3, 2), (32, 32, 3, 1), (16, 32, 1, 2), (32, 64, 3, 2))
SIZES = (*SIZES, (64, 64, 3, 1), (32, 64, 1, 2))  # inputs, outputs, kernel and stride of each convolution
NORMED = (16, 16, 16, 32, 32, 64, 64)


def numbered(name: str, at: int) -> str:
    """Return Keras's name of the layer of that kind and number."""
    return name if at == 0 else f"{name}_{at}"


class ResNet8(nn.Module):
    """Three blocks; the ways past the last two are convolutions of one pixel. Padding is TensorFlow's."""

    def __init__(self) -> None:
        super().__init__()
        for at, (inputs, outputs, kernel, stride) in enumerate(SIZES):
            self.add_module(numbered("conv2d", at), nn.Conv2d(inputs, outputs, kernel, stride))
        for at, channels in enumerate(NORMED):
            layer = nn.BatchNorm2d(channels, eps=1e-3)
            layer.num_batches_tracked = None
            self.add_module(numbered("batch_normalization", at), layer)
        self.dense = nn.Linear(NORMED[-1], 10)

    def _conv(self, x: Tensor, at: int) -> Tensor:
        _, _, kernel, stride = SIZES[at]
        missing = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
        before, after = missing // 2, missing - missing // 2
        found: Tensor = self.get_submodule(numbered("conv2d", at))(F.pad(x, (before, after, before, after)))
        return found

    def _normed(self, x: Tensor, conv: int, norm: int) -> Tensor:
        found: Tensor = self.get_submodule(numbered("batch_normalization", norm))(self._conv(x, conv))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 10) of pictures (batch, 3, 32, 32)."""
        x = F.relu(self._normed(x, 0, 0))
        x = F.relu(x + self._normed(F.relu(self._normed(x, 1, 1)), 2, 2))
        x = F.relu(self._conv(x, 5) + self._normed(F.relu(self._normed(x, 3, 3)), 4, 4))
        x = F.relu(self._conv(x, 8) + self._normed(F.relu(self._normed(x, 6, 5)), 7, 6))
        found: Tensor = self.dense(x.mean(dim=(2, 3)))
        return found


def inputs_of(found: np.ndarray) -> Tensor:
    """Return pictures (count, 32, 32, 3) of bytes as inputs of the model."""
    return torch.from_numpy(found).permute(0, 3, 1, 2).float().contiguous()


@functools.cache
def test_set() -> tuple[Tensor, Tensor]:
    """Return the pictures that are scored, and their classes; decoded once in a process."""
    found, classes = pictures("cifar10_testdev_jpg.npz", SCORED)
    return inputs_of(found), classes


def model() -> nn.Module:
    """Return the architecture."""
    return ResNet8()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the percentage of test pictures whose class is right."""
    return accuracy(model, *test_set())


def calibration_batches() -> Iterator[Tensor]:
    """Yield training pictures, which are as they were before JPEG."""
    with np.load(SETS / "cifar10_calib4k.npz") as stored:
        yield from inputs_of(stored["x"][:CALIBRATED]).split(BATCH)
