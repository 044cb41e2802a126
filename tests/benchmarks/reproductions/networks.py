"""What reproductions on a trained network have in common: it is compressed, trained and scored; budgets are kept to."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch

import tcompress
from reproductions.base import Conditions
from tcompress.errors import FormatError
from tcompress.formats import Format
from tcompress.training.objective import Method
from tcompress.training.tuning import TuningResult, needs_of, uses_of
from tcompress.workflow.plan import Plan
from tcompress.workflow.task import Task

TASKS = Path(__file__).parents[1] / "tasks"
MODELS = TASKS.parents[3] / "shared" / "data" / "models"
CPU = torch.device("cpu")
_MOST = 4096  # of a rank


@dataclass(frozen=True)
class Network:
    """A trained network and its task.

    task, model: names of files in tasks/ and in the data's models/. prefix: of the file's tensors, not of the task's.
    limits: variables of the environment that the task reads; those that are set already stay.
    """

    task: str
    model: str
    prefix: str = ""
    limits: Mapping[str, str] = field(default_factory=dict)

    def path(self) -> Path:
        """Return where the trained network lies."""
        known = os.environ.get("TCOMPRESS_DATA")
        return (Path(known) / "models" if known else MODELS) / self.model

    def load_task(self, needs: tuple[str, ...], uses: tuple[str, ...] = ()) -> Task:
        """Load the task under the limits, which hold for no other task."""
        with patch.dict(os.environ, {**self.limits, **os.environ}):
            return tcompress.load_task(str(TASKS / self.task), needs, uses)

    def compressed(self, given: Conditions, plan: Plan, *, calibrated: bool = False) -> Path:
        """Compress by a plan, and return the new file. calibrated: for the layers' outputs, on the task's inputs."""
        out = _new_file(given)
        with tcompress.open_checkpoint(self.path()) as dense:
            reconstruction = None
            if calibrated:
                task = self.load_task(("model", "calibration_batches"))
                reconstruction = tcompress.Reconstruction(dense, task, strip_prefix=self.prefix)
            tcompress.compress(dense, plan, out=out, reconstruction=reconstruction)
        return out

    def trained(
        self,
        given: Conditions,
        start: Path | Plan | None,
        method: Method | str,
        epochs: int,
        lr: float | None,
    ) -> TuningResult:
        """Train a compressed file, or the dense network by a plan; None for the plan that is the method's own.

        lr: None for the method's own rate.
        """
        how = tcompress.make_method(method) if isinstance(method, str) else method
        if isinstance(start, Plan) and not how.starts_dense:
            start = self.compressed(given, start)
        task = self.load_task(needs_of(how), uses_of(how))
        options = tcompress.TrainingOptions(epochs=given.epochs or epochs, seed=given.seed, lr=lr, device=CPU)
        out = _new_file(given)
        with tcompress.open_checkpoint(self.path()) as dense:
            if not isinstance(start, Path):
                return tcompress.finetune(
                    dense, task, how, out=out, plan=start, options=options, strip_prefix=self.prefix
                )
            with tcompress.open_checkpoint(start) as checkpoint:
                return tcompress.finetune(
                    checkpoint, task, how, out=out, against=dense, options=options, strip_prefix=self.prefix
                )


def values_of(setting: Format, shape: tuple[int, ...]) -> int:
    """Return how many values a setting stores, whatever it takes to say where they stand."""
    specs = setting.factor_specs(shape, torch.float32).values()
    return sum(spec.values if spec.nonzeros is None else spec.nonzeros for spec in specs)


def richest(make: Callable[[int], Format], count: Callable[[Format], int], most: int) -> Format | None:
    """Return the setting of the largest number, from 1 up, that stores no more values; None where none is so small."""
    found = None
    for number in range(1, _MOST):
        try:
            setting = make(number)
            if count(setting) > most:
                break
        except FormatError:
            break
        if found is not None and count(setting) == count(found):
            break  # of full rank
        found = setting
    return found


def accuracy(scores: Mapping[str, float]) -> str:
    """Return a percentage."""
    return f"{scores['accuracy']:.2f}"


def _new_file(given: Conditions) -> Path:
    return given.folder / f"{len(list(given.folder.iterdir()))}.safetensors"
