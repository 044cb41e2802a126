"""Rounds of ``iterate``: each compresses what the last one trained, and trains it.

Stopped, or killed, a run goes on in the round where it was: what a round starts from hangs on the last one's bytes, and
on nothing else that a run does not say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import LimitError, UsageError
from tcompress.formats import Format
from tcompress.formats.base import as_text
from tcompress.training.curves import Curves
from tcompress.training.history import Row
from tcompress.training.iterating import DENSE, Iterate
from tcompress.training.options import TrainingOptions
from tcompress.training.outcome import NothingBetterError, Round, Trained
from tcompress.training.round_files import Done, RoundFiles
from tcompress.training.starting import is_started
from tcompress.workflow.compression import compress
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan, Rule, exactly
from tcompress.workflow.recompression import recompress
from tcompress.workflow.results import describe
from tcompress.workflow.settings import Settings
from tcompress.workflow.shrinking import Ladder, Step, goals_of

if TYPE_CHECKING:
    from accelerate import Accelerator

Tell = Callable[[Sequence[Row]], None]
Train = Callable[[Checkpoint, TrainingOptions, Tell, Curves], Trained]


def check_rounds(method: Iterate, options: TrainingOptions) -> None:
    """Raise UsageError where there are more rounds than epochs."""
    epochs = options.epochs or method.defaults.epochs
    if epochs < method.rounds:
        raise UsageError(f"{epochs} epoch(s) are too few for {method.rounds} rounds; give more --epochs")


@dataclass(frozen=True)
class Course:
    """What all rounds of a run have in common. nbytes: of the dense checkpoint. train: trains, and writes the draft."""

    checkpoint: Checkpoint
    nbytes: int
    plan: Plan
    settings: Settings
    method: Iterate
    options: TrainingOptions
    files: RoundFiles
    accelerator: Accelerator

    def go(self, train: Train, tell: Tell, curves: Curves) -> tuple[Trained, tuple[Round, ...]]:
        """Make the rounds that are left, the last one's draft that of the output; return all of them as one training.

        Where a loss of a later round is not finite before anything was better, the round before is the last.
        Raises LimitError where no layer's rank comes down at all, and what ``train`` and ``compress`` raise.
        """
        self.files.output.is_worth_keeping = lambda: is_started(self.files.output)
        restarted = self._alone(self.files.begin) or False
        done, later = self.files.finished(), _Later(curves)
        while (ending := self._reached(done)) is None:
            try:
                self._round(done, train, tell, later)
            except NothingBetterError as error:
                if not done:
                    raise
                problem = f"round {len(done) + 1}: {error.problem}"
                done[-1] = replace(done[-1], trained=replace(done[-1].trained, problem=problem))
                continue
            before, done = len(done), self.files.finished()  # the same figures in every process
            if len(done) == before:
                ending = "no layer's rank comes down any more"
                break
        self._alone(lambda: self.files.hand_over(len(done)))
        return self._together(done, ending, restarted=restarted), tuple(each.round for each in done)

    def _alone(self, act: Callable[[], bool | None]) -> bool | None:
        """Let the main process do something while the others wait; in those, return None."""
        found = act() if self.accelerator.is_main_process else None
        self.accelerator.wait_for_everyone()
        return found

    def _round(self, done: Sequence[Done], train: Train, tell: Tell, curves: _Later) -> None:
        """Make the next round, if any layer's rank comes down."""
        number = len(done) + 1
        path, last = self.files.start(number), self.files.result(number - 1) if done else None
        self._alone(lambda: None if path.exists() else self._compress(last, path))
        if not path.exists():
            return
        if self.files.output.is_folder:
            self._alone(lambda: self.files.output.draft.mkdir(exist_ok=True))
        before = [row for each in done for row in each.trained.rows]
        with open_checkpoint(path) as start:
            nbytes = describe(start).nbytes
            this = Round(number, nbytes, nbytes, {}, {}, _changes(last, start))
            numbered = _Numbered(this, before)
            curves.steps = numbered.steps
            trained = train(start, self._options(done), lambda rows: tell(numbered.all(rows)), curves)
        this = replace(this, before=trained.before, after=trained.after)
        over = Done(this, replace(trained, rows=numbered.own(trained.rows)))
        self._alone(lambda: self.files.put(over))

    def _compress(self, last: Path | None, out: Path) -> None:
        """Make what a round starts from: the last one's result, further compressed; nothing if that saves nothing."""
        goals = goals_of(self.checkpoint, self.plan, self.settings)
        with _opened(last, self.checkpoint) as current:
            ladder = Ladder(current, self.checkpoint, self.settings)
            steps = ladder.steps(goals, self.method.weakening, towards_dense=self.method.towards == DENSE)
            steps = self._chosen(steps, describe(current).nbytes)
            if last is None and not steps:
                why = "EVBMF leaves no layer a rank that saves bytes" if goals else "no layer can be compressed"
                way_out = "give a plan with smaller ranks, or compress by --keep and finetune"
                raise LimitError(f"nothing to compress: {why}; {way_out}", path=self.checkpoint.path)
            if last is None:
                rules = [Rule(exactly(step.goal.layer.name), step.setting, store=step.goal.store) for step in steps]
                compress(self.checkpoint, Plan(tuple(rules)), out=out, settings=self.settings)
            elif steps:
                recompress(current, {step.goal.layer: ladder.fitted(step) for step in steps}, out=out)

    def _chosen(self, steps: Sequence[Step], nbytes: int) -> list[Step]:
        """Return those that save most, as many as a round takes, and no more than are needed."""
        excess, chosen = nbytes - self._allowed, list[Step]()
        for step in steps[: self.method.layers]:
            if excess > 0:
                chosen.append(step)
                excess -= step.saved
        return chosen

    @property
    def _allowed(self) -> float:
        """Bytes at which no layer more is compressed."""
        return (self.method.keep or 0.0) * self.nbytes

    def _options(self, done: Sequence[Done]) -> TrainingOptions:
        """Return how the next round is trained: its part of the epochs, and what is left of steps and hours."""
        asked, rounds = self.options, self.method.rounds
        total = asked.epochs or self.method.defaults.epochs
        steps, hours = self._left(done)
        return replace(
            asked,
            epochs=total * (len(done) + 1) // rounds - total * len(done) // rounds,
            steps=steps,
            max_hours=hours,
            seed=asked.seed + len(done),  # batches come in another order than in the same epoch of the last round
        )

    def _left(self, done: Sequence[Done]) -> tuple[int | None, float | None]:
        """Return the steps and hours that are left, None where there is no limit."""
        asked, spent = self.options, sum(each.trained.seconds for each in done) / 3600
        steps = None if asked.steps is None else asked.steps - sum(each.trained.steps for each in done)
        return steps, None if asked.max_hours is None else asked.max_hours - spent

    def _reached(self, done: Sequence[Done]) -> str | None:
        """Return why the last round is the last one of all; None where there is to be another."""
        if not done:
            return None
        if done[-1].trained.problem is not None:
            return done[-1].trained.problem
        if len(done) == self.method.rounds:
            return "all rounds are made"
        if self.method.keep is not None and done[-1].round.nbytes <= self._allowed:
            return f"keep={self.method.keep:g} is reached"
        if any(limit is not None and limit <= 0 for limit in self._left(done)):
            return "its steps or hours are used up"
        return None

    def _together(self, done: Sequence[Done], ending: str | None, *, restarted: bool) -> Trained:
        """Return all rounds as one training. ending: why there are no more."""
        last, rounds, keep = done[-1].trained, self.method.rounds, self.method.keep
        notes = ["what an unfinished run with other settings had left was thrown away"] if restarted else []
        notes += [f"round {each.round.number}: {note}" for each in done for note in each.trained.notes]
        if len(done) < rounds:
            notes.append(f"ended after round {len(done)} of {rounds}: {ending}")
        if keep is not None and done[-1].round.nbytes > self._allowed:
            part = done[-1].round.nbytes / self.nbytes
            notes.append(f"keep={keep:g} is not reached, {part:.3f} of the bytes are left; more rounds may")
        return replace(
            last,
            rows=tuple(row for each in done for row in each.trained.rows),
            best_epoch=last.rows[0].epoch + last.best_epoch,
            steps=sum(each.trained.steps for each in done),
            notes=tuple(notes),
        )


class _Numbered:
    """The rows of a round as those of the whole run: epochs, steps and seconds go on from where the last one ended.

    Its first row, the model as it was compressed, has the number of the epoch before.
    """

    def __init__(self, this: Round, before: Sequence[Row]) -> None:
        self._this, self._before = this, before
        self.epochs, self.steps, self.seconds = 0, 0, 0.0
        if before:
            self.epochs, self.steps, self.seconds = before[-1].epoch, before[-1].step, before[-1].seconds

    def own(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        return tuple(
            replace(
                row,
                epoch=row.epoch + self.epochs,
                step=row.step + self.steps,
                seconds=row.seconds + self.seconds,
                round=self._this.number,
                nbytes=self._this.nbytes_before,
            )
            for row in rows
        )

    def all(self, rows: Sequence[Row]) -> list[Row]:
        return [*self._before, *self.own(rows)]


class _Later(Curves):
    """Curves of which each round goes on from a step of the run, and only the first one in this process begins them."""

    def __init__(self, curves: Curves) -> None:
        self._curves, self.steps, self._has_begun = curves, 0, False

    def begin(self, step: int) -> None:
        if not self._has_begun:
            self._curves.begin(step + self.steps)
        self._has_begun = True

    def loss(self, step: int, value: float) -> None:
        self._curves.loss(step + self.steps, value)

    def flush(self) -> None:
        self._curves.flush()


@contextmanager
def _opened(path: Path | None, dense: Checkpoint) -> Iterator[Checkpoint]:
    if path is None:
        yield dense
        return
    with open_checkpoint(path) as checkpoint:
        yield checkpoint


def _changes(last: Path | None, start: Checkpoint) -> dict[str, tuple[str | None, str]]:
    """Return what each layer was, None for dense, and what it became, of those that changed."""
    now, was = _settings(start), dict[str, str]()
    if last is not None:
        with open_checkpoint(last) as checkpoint:
            was = _settings(checkpoint)
    return {name: (was.get(name), text) for name, text in now.items() if was.get(name) != text}


def _settings(checkpoint: Checkpoint) -> dict[str, str]:
    found = view(checkpoint)
    return {name: _told(found.setting(name)) for name in found.manifest.layers}


def _told(setting: Format) -> str:
    """Return a setting as its ranks alone: svd:rank=8."""
    ranks = {name: value for name, value in setting.options().items() if name in ("rank", "ranks")}
    return ":".join([setting.name, *(f"{name}={as_text(value)}" for name, value in ranks.items())])
