"""Task: CIFAR-10 ResNet-20, for models/resnet20.th with --strip-prefix module.

The data are in ../shared/data beside the checkout, or where TCOMPRESS_DATA says; TCOMPRESS_SCORED limits the images
that are scored, TCOMPRESS_TRAINED those that are learnt from, 5000 if it is not set. Both went through JPEG, which
costs the dense model ten points, and training wins some of them back: look at differences.
"""

from __future__ import annotations

import functools
import io
import os
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SETS = Path(os.environ.get("TCOMPRESS_DATA", Path(__file__).parents[4] / "shared" / "data")) / "sets"
SCORED = int(os.environ.get("TCOMPRESS_SCORED", "0")) or None
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the channels, as the model was trained
BLOCKS, WIDTHS = 3, (16, 32, 64)
CALIBRATED, BATCH = 1000, 100
TRAINED = int(os.environ.get("TCOMPRESS_TRAINED", "5000"))
TRAIN_BATCH = 50  # pictures in a batch: few epochs of few pictures need many steps


def normed(channels: int) -> nn.BatchNorm2d:
    """Return a batch normalisation as the checkpoint has it: without a count of batches."""
    layer = nn.BatchNorm2d(channels)
    layer.num_batches_tracked = None
    return layer


class Block(nn.Module):
    """Two convolutions beside a way past them, which has no weights: new channels are zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = normed(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = normed(outputs)
        self.stride = stride
        self.added = (outputs - inputs) // 2  # zero channels on either side

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways."""
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        past = x[..., :: self.stride, :: self.stride]
        return F.relu(inner + F.pad(past, (0, 0, 0, 0, self.added, self.added)))


class ResNet(nn.Module):
    """Three stages of so many blocks; each stage halves the picture and doubles the channels."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.blocks = blocks
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = normed(WIDTHS[0])
        self.layer1 = self._stage(WIDTHS[0], WIDTHS[0], 1)
        self.layer2 = self._stage(WIDTHS[0], WIDTHS[1], 2)
        self.layer3 = self._stage(WIDTHS[1], WIDTHS[2], 2)
        self.linear = nn.Linear(WIDTHS[2], 10)

    def _stage(self, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        more = (Block(outputs, outputs, 1) for _ in range(self.blocks - 1))
        return nn.Sequential(Block(inputs, outputs, stride), *more)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, 10) of pictures (batch, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def pixels(found: np.ndarray) -> Tensor:
    """Return pictures (count, 32, 32, 3) of bytes as inputs of the model."""
    channels_first = torch.from_numpy(found).permute(0, 3, 1, 2).float().div_(255)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return ((channels_first - mean) / deviation).contiguous()


def pictures(name: str, most: int | None) -> tuple[np.ndarray, Tensor]:
    """Return the first pictures of a set, (count, 32, 32, 3) of bytes, and their classes."""
    with np.load(SETS / name) as stored:
        files, offsets, classes = stored["jpg"].tobytes(), stored["offset"].tolist(), stored["y"][:most]
    spans = list(pairwise(offsets))[: len(classes)]
    found = [np.asarray(Image.open(io.BytesIO(files[start:end])).convert("RGB")) for start, end in spans]
    return np.stack(found), torch.from_numpy(classes)


def decoded(name: str, most: int | None) -> tuple[Tensor, Tensor]:
    """Return the first pictures of a set as inputs of the model, and their classes."""
    found, classes = pictures(name, most)
    return pixels(found), classes


@functools.cache
def test_set() -> tuple[Tensor, Tensor]:
    """Return the pictures that are scored, and their classes; decoded once in a process."""
    return decoded("cifar10_testdev_jpg.npz", SCORED)


@functools.cache
def train_set() -> tuple[Tensor, Tensor]:
    """Return the pictures to learn from, and their classes; decoded once in a process."""
    return decoded("cifar10_train_jpg.npz", TRAINED)


def model() -> nn.Module:
    """Return the architecture."""
    return ResNet()


def evaluate(model: nn.Module) -> dict[str, float]:
    """Return the percentage of test pictures whose class is right."""
    return accuracy(model, *test_set())


def accuracy(model: nn.Module, inputs: Tensor, classes: Tensor) -> dict[str, float]:
    """Return the percentage of inputs whose class is right."""
    device = next(chain(model.parameters(), model.buffers())).device
    with torch.inference_mode():
        found = torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in inputs.split(50)])
    return {"accuracy": 100 * float((found == classes).double().mean())}


def calibration_batches() -> list[Tensor]:
    """Return training pictures, which are as they were before JPEG."""
    with np.load(SETS / "cifar10_calib4k.npz") as stored:
        return list(pixels(stored["x"][:CALIBRATED]).split(BATCH))


def train_batches() -> list[tuple[Tensor, Tensor]]:
    """Return the pictures to learn from, in another order each time."""
    inputs, classes = train_set()
    return [(inputs[chosen], classes[chosen]) for chosen in torch.randperm(len(classes)).split(TRAIN_BATCH)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy."""
    inputs, classes = batch
    return F.cross_entropy(model(inputs), classes)
