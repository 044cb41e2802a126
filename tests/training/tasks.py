"""Task files for training, as text: a small network on scikit-learn's digits, and what tests do to it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.workflow.decoding import view

ROOT = Path(__file__).parent.parent.parent

MLP = f"""
import sys
sys.path.append({str(ROOT)!r})
import torch
import torch.nn.functional as F
from fixtures.models import DigitsMLP, held_out_images, training_images

def model():
    return DigitsMLP()

def train_batches():
    images, labels = training_images()
    order = torch.randperm(640)
    return [(images[chosen], labels[chosen]) for chosen in order.split(128)]

def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)

def evaluate(model):
    images, labels = held_out_images()
    return {{"accuracy": int((model(images).argmax(1) == labels).sum()) / len(labels)}}
"""

# Draws from every generator, in the middle of an epoch too, and has statistics that training changes.
CNN = f"""
import os, random, signal, sys
sys.path.append({str(ROOT)!r})
import numpy as np
import torch
import torch.nn.functional as F
from fixtures.models import DigitsCNN, held_out_images, training_images

calls = 0
die_at = int(os.environ.get("DIE_AT", "0"))
how = os.environ.get("DIE_HOW", "")

def model():
    return DigitsCNN()

def train_batches():
    images, labels = training_images()
    for chosen in torch.randperm(320).split(64):
        noise = 0.01 * torch.randn(len(chosen), 1, 8, 8) + 0.01 * random.random() + 0.01 * np.random.rand()
        yield images[chosen] + noise.float(), labels[chosen]

def loss(model, batch):
    global calls
    calls += 1
    if calls == die_at and how == "interrupt":
        raise KeyboardInterrupt
    if calls == die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    images, labels = batch
    return F.cross_entropy(model(F.dropout(images, 0.1)), labels)

def evaluate(model):
    images, labels = held_out_images()
    return -float(F.cross_entropy(model(images), labels))
"""

THREE = """
import torch
from torch import nn

def model():
    return nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3)))

def train_batches():
    return torch.randn(8, 16, 24)

def loss(model, batch):
    return model(batch).square().mean()

def evaluate(model):
    return -float(model(torch.ones(1, 24)).square().mean())
"""

# A normalisation that keeps no count of its batches, as in files of before 2018.
UNCOUNTED = """
import os
import torch
from torch import nn

def model():
    made = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24))
    made[1].num_batches_tracked = None
    return made

def train_batches():
    yield from torch.randn(4, 16, 24)
    if os.environ.get("DIE_HOW") == "interrupt":
        raise KeyboardInterrupt

def loss(model, batch):
    return (model(batch) - batch).square().mean()

def evaluate(model):
    return 1.0
"""


def factors(path: Path) -> dict[tuple[str, str], Tensor]:
    """Return the values of all factors in a file, by layer and name."""
    dense = view(open_checkpoint(path))
    return {(layer, name): factor for layer in dense.manifest.layers for name, factor in dense.factors(layer)}
