"""Task files: a user's Python file says what a model is and how good it is.

A task is plain functions in a file, or methods of an object in it, named as ``task.py:name``:

    def model() -> torch.nn.Module                       the architecture; its weights do not matter
    def evaluate(model) -> float | dict[str, float]      scores of a model with weights
    def calibration_batches() -> Iterable                inputs of the model: a tensor, tuple or dict of tensors each
    def train_batches() -> Iterable                      whatever loss takes
    def loss(model, batch) -> torch.Tensor               one value
    def example_inputs() -> a tensor, tuple or dict      inputs of the model, batch size first
    def dynamic_shapes() -> tuple or dict                which of their sizes an exported model leaves open
    def optimizer(parameters) -> torch.optim.Optimizer   how training changes the parameters, a list
    def scheduler(optimizer) -> LRScheduler              its learning rate; stepped after each step of the optimizer
    def teacher() -> torch.nn.Module                     a model with weights, whose outputs are learnt
    def logits(model, batch) -> torch.Tensor             (..., classes), what is learnt of a teacher's outputs

A tensor is the model's only argument, a tuple its arguments, a dict its arguments by name. Loading a task runs its
file: nothing here protects from what it does.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from tcompress.errors import TaskError, UsageError
from tcompress.workflow.user_code import accepts, call, find_object, load

_SIGNATURES = {
    "model": "def model() -> torch.nn.Module",
    "evaluate": "def evaluate(model) -> float | dict[str, float]",
    "calibration_batches": "def calibration_batches() -> Iterable[torch.Tensor | tuple | dict]",
    "train_batches": "def train_batches() -> Iterable",
    "loss": "def loss(model, batch) -> torch.Tensor",
    "example_inputs": "def example_inputs() -> torch.Tensor | tuple | dict",
    "dynamic_shapes": "def dynamic_shapes() -> tuple | dict",
    "optimizer": "def optimizer(parameters) -> torch.optim.Optimizer",
    "scheduler": "def scheduler(optimizer) -> torch.optim.lr_scheduler.LRScheduler",
    "teacher": "def teacher() -> torch.nn.Module",
    "logits": "def logits(model, batch) -> torch.Tensor",
}
_ARGUMENTS = {"evaluate": 1, "loss": 2, "optimizer": 1, "scheduler": 1, "logits": 2}  # of the others none


class Task:
    """What a user's file says about a model. Every call runs the user's code.

    spec: ``task.py`` or ``task.py:name``, as it was asked for. path: the file. batches: the function that gives the
    batches to train on.

    What the code prints goes to stderr. Whatever it raises becomes a TaskError that names file, line, type and message;
    KeyboardInterrupt, Stopped and errors of this package pass.
    """

    def __init__(self, spec: str, path: Path, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.spec = spec
        self.path = path
        self.batches = "train_batches"
        self._functions = dict(functions)

    def has(self, name: str) -> bool:
        """Whether the task has this function, and it was asked for when the task was loaded."""
        return name in self._functions

    def model(self) -> nn.Module:
        """Return a new model with weights of no meaning. Raises TaskError when it is no ``torch.nn.Module``."""
        made = self._call("model")
        if not isinstance(made, nn.Module):
            raise self._wrong("model", made, "a torch.nn.Module")
        return made

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the model's scores by name; a lone number is called ``score``.

        Raises TaskError when they are no finite numbers, or there are none.
        """
        answer = self._call("evaluate", model)
        scores = answer if isinstance(answer, Mapping) else {"score": answer}
        if not scores or not all(isinstance(name, str) for name in scores):
            raise self._wrong("evaluate", answer, "a number, or a dict of numbers by their names")
        found = {}
        for name, score in scores.items():
            number = _number(score)
            if number is None:
                raise self._wrong(f"evaluate(model)[{name!r}]" if scores is answer else "evaluate", score, "a number")
            if not math.isfinite(number):
                raise TaskError(f"evaluate gives {number} as {name}; scores must be finite numbers", path=self.path)
            found[name] = number
        return found

    def calibration_batches(self) -> Iterator[Any]:
        """Yield inputs of the model. Raises TaskError when the user's iterable fails, or is none."""
        return self._batches("calibration_batches")

    def with_batches_of(self, name: str) -> Task:
        """Return the task with this function in the place of its ``train_batches``."""
        task = Task(self.spec, self.path, self._functions)
        task.batches = name
        return task

    def train_batches(self) -> Iterator[Any]:
        """Yield batches to train on, for ``loss``. Raises TaskError when the user's iterable fails, or is none."""
        return self._batches(self.batches)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss, of shape (). Raises TaskError when it is no tensor of one floating value."""
        found = self._call("loss", model, batch)
        if not isinstance(found, Tensor) or found.numel() != 1 or not found.is_floating_point():
            raise self._wrong("loss", found, "a tensor of one floating value")
        return found.reshape(())

    def optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return what changes the parameters. Raises TaskError when it is no optimizer of torch's."""
        made = self._call("optimizer", parameters)
        if not isinstance(made, Optimizer):
            raise self._wrong("optimizer", made, "a torch.optim.Optimizer")
        return made

    def scheduler(self, optimizer: Optimizer) -> LRScheduler:
        """Return what sets the learning rate. Raises TaskError when it cannot be stepped without a score."""
        made = self._call("scheduler", optimizer)
        if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
            raise self._wrong("scheduler", made, "a torch.optim.lr_scheduler.LRScheduler that needs no score")
        return made

    def teacher(self) -> nn.Module:
        """Return a model with weights. Raises TaskError when it is no ``torch.nn.Module``."""
        made = self._call("teacher")
        if not isinstance(made, nn.Module):
            raise self._wrong("teacher", made, "a torch.nn.Module")
        return made

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits (..., classes). Raises TaskError when they are no tensor of floating values."""
        found = self._call("logits", model, batch)
        if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim == 0:
            raise self._wrong("logits", found, "a tensor of floating values, (..., classes)")
        return found

    def example_inputs(self) -> Any:
        """Return inputs of the model as the user gives them: a tensor, tuple or dict of tensors, batch size first."""
        return self._call("example_inputs")

    def dynamic_shapes(self) -> Any:
        """Return what ``torch.export.export`` takes as its ``dynamic_shapes``, as the user gives it."""
        return self._call("dynamic_shapes")

    def batch_count(self) -> int | None:
        """Return how many training batches there are, None where what gives them does not say."""
        found = self._call(self.batches)
        try:
            return int(call(self.path, len, found))
        except TaskError as error:
            if isinstance(error.__cause__, TypeError):  # a generator, or a loader of a stream
                return None
            raise

    def _call(self, name: str, *arguments: Any) -> Any:
        return call(self.path, self._functions[name], *arguments)

    def _batches(self, name: str) -> Iterator[Any]:
        found = self._call(name)
        if not isinstance(found, Iterable):
            raise self._wrong(name, found, "something to iterate over")
        iterator, end = call(self.path, iter, found), object()
        while (batch := call(self.path, next, iterator, end)) is not end:
            yield batch

    def _wrong(self, name: str, found: object, wanted: str) -> TaskError:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        return TaskError(f"{name} gives {type(found).__name__}{shape}; it must give {wanted}", path=self.path)


def load_task(spec: str, needs: Collection[str], uses: Collection[str] = ()) -> Task:
    """Run a task's file and check what it has to have.

    spec: ``task.py``, or ``task.py:name`` for an object in it: an instance, a namespace, or a class that is made
    without arguments. needs: functions it must have. uses: functions that are called where it has them.

    While the file and its functions run, its folder can be imported from; no bytecode is left there.

    Raises UsageError, with everything that is missing at once, when the file, the object or a function is not there or
    takes other arguments; TaskError when the file raises an exception.
    """
    path, name = _parts(spec)
    module = call(path, load, path)
    where, holder = str(path), module
    if name is not None:
        where, holder = f"{path}:{name}", find_object(path, module, name)
    found = {each: call(path, getattr, holder, each, None) for each in (*needs, *uses)}
    problems = [f"has no function {each}; write: {_SIGNATURES[each]}" for each in needs if found[each] is None]
    there = {each: function for each, function in found.items() if function is not None}
    problems += [text for each, function in there.items() if (text := _unfit(each, function)) is not None]
    if problems:
        raise UsageError("; and ".join(problems), path=where)
    return Task(spec, path, there)


def _parts(spec: str) -> tuple[Path, str | None]:
    """Split ``task.py:name``, and see that the file is there."""
    file, colon, name = spec.rpartition(":")
    if not colon or spec.endswith(".py"):
        file, name = spec, ""
    elif not name.isidentifier():
        raise UsageError(f"{name!r} names no object; write task.py, or task.py:name", path=spec)
    path = Path(file)
    if path.suffix != ".py":
        raise UsageError("is no task file: a task is a Python file whose name ends with .py", path=path)
    if not path.is_file():
        raise UsageError("there is no such task file" if not path.exists() else "is no file", path=path)
    return path, name or None


def _unfit(name: str, function: object) -> str | None:
    """Say why this object cannot be the function of that name, None when it can."""
    if not callable(function):
        return f"its {name} is no function but {type(function).__name__}; write: {_SIGNATURES[name]}"
    count = _ARGUMENTS.get(name, 0)
    if not accepts(function, count):
        return f"its {name} cannot be called with {count} argument(s); write: {_SIGNATURES[name]}"
    return None


def _number(score: object) -> float | None:
    if isinstance(score, Tensor):
        score = score.item() if score.numel() == 1 else score
    elif hasattr(score, "dtype") and getattr(score, "ndim", None) == 0:
        score = score.item()  # type: ignore[attr-defined]  # NumPy's arrays and scalars of one value
    if isinstance(score, bool) or not isinstance(score, numbers.Real):
        return None
    return float(score)
