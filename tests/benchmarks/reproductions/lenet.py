"""What the reproductions on LeNet-300-100 have in common: one budget of values for both hidden layers, and training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import tcompress
from reproductions.base import Conditions
from reproductions.networks import Network, richest, values_of
from tcompress.checkpoint.layers import find_layers
from tcompress.formats import Format
from tcompress.training.tuning import TuningResult
from tcompress.workflow.plan import Plan, Rule, exactly

LENET = Network("lenet300.py", "lenet300.safetensors")
EPOCHS, RATE = 4, 3e-3


def plan_within(make: Callable[[int], Format], part: float) -> tuple[Plan, int]:
    """Return the plan that keeps this part of the values of each hidden layer, and how many it keeps of both."""
    rules, kept = [], 0
    with tcompress.open_checkpoint(LENET.path()) as dense:
        for layer in find_layers(dense)[:2]:
            count = partial(values_of, shape=layer.shape)
            setting = richest(make, count, int(part * layer.values))
            if setting is not None:
                rules.append(Rule(exactly(layer.name), setting))
                kept += count(setting)
    return Plan(tuple(rules)), kept


def trained(
    given: Conditions, plan: Plan, method: str = "finetune", epochs: int = EPOCHS, lr: float = RATE
) -> TuningResult:
    """Compress the network by a plan, and train it; a method that starts dense does both."""
    return LENET.trained(given, plan, method, epochs, lr)
