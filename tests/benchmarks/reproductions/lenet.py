"""What the reproductions on LeNet-300-100 have in common: one budget of values, and a layer's richest setting in it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import tcompress
from reproductions.base import Conditions
from tcompress.checkpoint.layers import find_layers
from tcompress.errors import FormatError
from tcompress.formats import Format
from tcompress.training.tuning import TuningResult, needs_of, uses_of
from tcompress.workflow.plan import Plan, Rule, exactly

TASK = Path(__file__).parents[1] / "tasks" / "lenet300.py"
MODELS = TASK.parents[4] / "shared" / "data" / "models"
EPOCHS, RATE = 4, 3e-3
_MOST = 4096  # of a rank


def model_path() -> Path:
    """Return where the trained network lies."""
    known = os.environ.get("TCOMPRESS_DATA")
    return (Path(known) / "models" if known else MODELS) / "lenet300.safetensors"


def values_of(setting: Format, shape: tuple[int, ...]) -> int:
    """Return how many values a setting stores, whatever it takes to say where they stand."""
    specs = setting.factor_specs(shape, torch.float32).values()
    return sum(spec.values if spec.nonzeros is None else spec.nonzeros for spec in specs)


def richest(make: Callable[[int], Format], shape: tuple[int, ...], most: int) -> Format | None:
    """Return the setting of the largest number, from 1 up, that stores no more values; None where none is so small."""
    found = None
    for number in range(1, _MOST):
        try:
            setting = make(number)
            if values_of(setting, shape) > most:
                break
        except FormatError:
            break
        if found is not None and values_of(setting, shape) == values_of(found, shape):
            break  # of full rank
        found = setting
    return found


def plan_within(make: Callable[[int], Format], part: float) -> tuple[Plan, int]:
    """Return the plan that keeps this part of the values of each hidden layer, and how many it keeps of both."""
    rules, kept = [], 0
    with tcompress.open_checkpoint(model_path()) as dense:
        for layer in find_layers(dense)[:2]:
            setting = richest(make, layer.shape, int(part * layer.values))
            if setting is not None:
                rules.append(Rule(exactly(layer.name), setting))
                kept += values_of(setting, layer.shape)
    return Plan(tuple(rules)), kept


def trained(
    given: Conditions, plan: Plan, method: str = "finetune", epochs: int = EPOCHS, **options: float
) -> TuningResult:
    """Compress the network by a plan, and train it; a method that starts dense does both."""
    how = tcompress.make_method(method)
    task = tcompress.load_task(str(TASK), needs_of(how), uses_of(how))
    asked = tcompress.TrainingOptions(
        epochs=given.epochs or epochs, seed=given.seed, device=torch.device("cpu"), **{"lr": RATE, **options}
    )
    number = len(list(given.folder.iterdir()))
    start, out = given.folder / f"{number}.safetensors", given.folder / f"{number}-tuned.safetensors"
    with tcompress.open_checkpoint(model_path()) as dense:
        if how.starts_dense:
            return tcompress.finetune(dense, task, how, out=out, plan=plan, options=asked)
        tcompress.compress(dense, plan, out=start)
        with tcompress.open_checkpoint(start) as checkpoint:
            return tcompress.finetune(checkpoint, task, how, out=out, against=dense, options=asked)


def accuracy(scores: Mapping[str, float]) -> str:
    """Return a percentage."""
    return f"{scores['accuracy']:.2f}"
