"""The loop that every method trains with: epochs of steps, each scored as the model would be stored.

A run saves its state at each epoch and every few minutes. Started again it goes on there, and ends with the bytes of a
run that was never stopped: generators are seeded before each pass over the batches, those that were used are passed
over, and generators are put where they were.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from tcompress.errors import NumericalError, TaskError, UsageError
from tcompress.training.batches import count_batches, for_steps, seed_all, steps_in
from tcompress.training.engine import Engine
from tcompress.training.factors import learning_factors
from tcompress.training.history import Row
from tcompress.training.losses import Losses, naming, require_gradient, untouched
from tcompress.training.objective import Objective
from tcompress.training.outcome import Best, Outcome, Position
from tcompress.training.schedule import make_optimizer, make_scheduler
from tcompress.training.state import random_state, set_random_state
from tcompress.training.watching import Moment


def train(engine: Engine, model: nn.Module, objective: Objective) -> Outcome:
    """Train a model that is on its device, and leave it with the best values.

    Raises TaskError when the task's code fails, or its loss does not reach any factor; SafetyError when the memory is
    not enough; UsageError where no factor learns.
    """
    return _Run(engine, model, objective).finish()


class _Run:
    """One training of one model."""

    def __init__(self, engine: Engine, model: nn.Module, objective: Objective) -> None:
        self.engine, self.inner, self.objective = engine, model, objective
        self.accelerator, self.task, self.options = engine.accelerator, engine.task, engine.options
        self.factors = learning_factors(model)
        if not self.factors:
            problem = "has no compressed layer that learns: all are dense in this model, or frozen by model()"
            raise UsageError(problem, path=self.task.path)
        self.total = self._planned_steps()
        parameters = [each for each in model.parameters() if each.requires_grad]
        optimizer = make_optimizer(self.task, parameters, self.options.lr, engine.defaults.lr)
        self.scheduler = make_scheduler(self.task, optimizer, lambda step: objective.rate(step, self.total))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.at, self.rows = Position(), list[Row]()
        self.best: Best | None = None
        self.resumed_at: int | None = None
        self.problem: str | None = None
        self.rate = 0.0  # of the last step
        self._random: Mapping[str, Any] | None = None
        self._begin()
        self.started = time.monotonic() - self.at.seconds
        self.saved_at = self.at.seconds

    def finish(self) -> Outcome:
        """Train to the end, and put the best values into the model."""
        try:
            while not self._is_over():
                self._epoch()
        except NumericalError as error:
            self.problem = str(error)
        if self.best is not None:
            self.inner.load_state_dict(self.best.values)
        return Outcome(self.best, tuple(self.rows), self.at.step, self._seconds(), self.problem, self.resumed_at)

    def _planned_steps(self) -> int:
        """Return how many steps there will be, if nothing ends them sooner."""
        epochs, most = self.engine.epochs, self.options.steps
        if epochs is None:
            assert most is not None, "one of the two is known"  # noqa: S101
            return most
        batches = count_batches(self.task, self.options.seed)
        steps = epochs * steps_in(batches, self.accelerator.num_processes, self.options.accumulate)
        if steps == 0:
            processes = self.accelerator.num_processes
            problem = f"{self.task.batches} gives {batches} batch(es) for {processes} processes"
            raise UsageError(problem, path=self.task.path)
        return steps if most is None else min(steps, most)

    def _begin(self) -> None:
        """Go on where a run was stopped, or look at the model as it is."""
        found = self.engine.saved.read()
        if found is not None:
            self._restore(found)
            self.engine.curves.begin(self.at.step + 1)
            self.engine.tell(self.rows)
            return
        self.engine.curves.begin(0)
        scores = self.engine.evaluate(self.inner)
        if self.objective.may_be_written(0):
            self.best = Best(0, scores, _copied(self.inner))
        self._record(0, None, scores, is_best=self.best is not None)

    def _is_over(self) -> bool:
        epochs, patience, hours = self.engine.epochs, self.options.patience, self.options.max_hours
        return (
            self.at.step >= self.total
            or (epochs is not None and self.at.epoch > epochs)
            or (patience is not None and self.at.idle >= patience)
            or (hours is not None and self.at.seconds >= hours * 3600)
        )

    def _epoch(self) -> None:
        """Make the steps of an epoch, or the rest of them; then score the model, and save everything."""
        seed_all(self.options.seed, self.at.epoch)
        self.objective.begin_epoch(self.at.epoch, anew=self.at.steps_of_epoch == 0)
        self.model.train()
        workers, rank = self.accelerator.num_processes, self.accelerator.process_index
        steps = for_steps(self.task.train_batches(), workers, rank, self.options.accumulate)
        used = self.at.steps_of_epoch
        passed_over = sum(1 for _ in islice(steps, used))
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        losses = Losses(self.at.step, self.at.losses, self.engine.curves.loss)
        for batches in steps:
            self.objective.begin_step(self.at.step, self.total)
            losses.add(self._step(batches))
            self.at = replace(self.at, step=self.at.step + 1, steps_of_epoch=self.at.steps_of_epoch + 1)
            self._show(losses.latest)
            if self._is_stopped(losses):
                break
        if self.at.steps_of_epoch == 0 or passed_over < used:
            problem = f"epoch {self.at.epoch}: {self.task.batches} gives too few batches; it must give all, each time"
            raise TaskError(problem, path=self.task.path)
        self._close_epoch(losses.sum() / self.at.steps_of_epoch)

    def _is_stopped(self, losses: Losses) -> bool:
        """Save the state where it is time to, and tell whether this step was the last one of all."""
        self.at = replace(self.at, seconds=self._together(self._seconds()))
        if self._is_over():
            return True
        if self.at.seconds - self.saved_at >= self.options.save_every * 60:
            self.at = replace(self.at, losses=losses.sum())
            self._save()
        return False

    def _step(self, batches: Sequence[Any]) -> Tensor:
        """Change the parameters once; return the mean loss of the batches, over all processes."""
        losses, step = [], f"step {self.at.step + 1} (epoch {self.at.epoch})"
        for number, batch in enumerate(batches, start=1):
            with naming(self.task, step, batch), self._apart(is_last=number == len(batches)):
                loss = self._loss(send_to_device(batch, self.accelerator.device)) / len(batches)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        if self.at.step == 0:
            self._require_gradient()
        self.rate = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        mean = torch.stack(losses).sum()
        return self.accelerator.reduce(mean, "mean") if self.accelerator.num_processes > 1 else mean

    def _loss(self, batch: Any) -> Tensor:
        half = torch.autocast(self.accelerator.device.type, torch.bfloat16)
        with half if self.options.precision == "bf16" else nullcontext():
            loss = self.objective.loss(self.model, batch)
        require_gradient(loss, self.task)
        return loss

    def _apart(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Let processes exchange gradients with the last batch of a step only."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.model)

    def _require_gradient(self) -> None:
        if all(factor.grad is None for factor in self.factors):
            raise untouched(self.task)

    def _close_epoch(self, loss: float) -> None:
        at = self.at
        self.objective.end_epoch(at.epoch)
        scores = self.engine.evaluate(self.inner)
        if self._score not in scores:
            raise TaskError(
                f"evaluate no longer gives {self._score}, by which models are compared", path=self.task.path
            )
        may = self.objective.may_be_written(at.epoch)
        is_best = may and (self.best is None or scores[self._score] > self.best.score[1])
        if is_best:
            self.best = Best(at.epoch, scores, _copied(self.inner))
        idle = at.idle + 1 if may and not is_best else 0
        self.at = Position(at.epoch + 1, at.step, idle=idle, seconds=self._seconds())
        self._record(at.epoch, loss, scores, is_best=is_best)
        self._save()

    def _record(self, epoch: int, loss: float | None, scores: Mapping[str, float], *, is_best: bool) -> None:
        self.rows.append(Row(epoch, self.at.step, loss, self.rate, self.at.seconds, is_best, dict(scores)))
        self.engine.tell(self.rows)

    def _show(self, loss: float | None) -> None:
        score = (self._score, self.rows[-1].scores[self._score])
        moment = Moment(self.at.epoch, self.engine.epochs, self.at.step, self.total, loss, score)
        self.engine.watch(moment)

    @property
    def _score(self) -> str:
        """The name of the score by which models are compared."""
        return next(iter(self.rows[0].scores))

    def _seconds(self) -> float:
        return time.monotonic() - self.started

    def _together(self, figure: float) -> float:
        """Return the mean of a figure over the processes, so that all of them decide alike."""
        if self.accelerator.num_processes == 1:
            return figure
        value = torch.tensor(figure, dtype=torch.float32, device=self.accelerator.device)
        return float(self.accelerator.reduce(value, "mean"))

    def _save(self) -> None:
        """Write down everything that the rest of the run hangs on."""
        generators = gather_object([random_state()])
        if self.accelerator.is_main_process:
            content = {
                "position": asdict(self.at),
                "model": self.inner.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "generators": generators,
                "best": None if self.best is None else self.best.to_plain(),
                "rows": [asdict(row) for row in self.rows],
            }
            self.engine.curves.flush()
            self.engine.saved.write(content)
        self.accelerator.wait_for_everyone()
        self.saved_at = self.at.seconds

    def _restore(self, found: Mapping[str, Any]) -> None:
        self.at = Position(**found["position"])
        self.inner.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.scheduler.load_state_dict(found["scheduler"])
        self._random = found["generators"][self.accelerator.process_index] if self.at.steps_of_epoch else None
        self.best = None if found["best"] is None else Best(**found["best"])
        self.rows = [Row(**row) for row in found["rows"]]
        self.resumed_at = self.at.step


def _copied(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of its own, on the CPU; with versions, without which modules take it for an old one."""
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in state.items():
        state[name] = copy.deepcopy(tensor.detach()).cpu()
    return state
