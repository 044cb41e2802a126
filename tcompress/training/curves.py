"""What a run came to, step by step, as curves that TensorBoard shows while it goes on."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tcompress.errors import OutputError, UsageError, printable
from tcompress.training.history import Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

EVENTS = "events.out.tfevents.*"  # what TensorBoard reads of a folder


class Curves:
    """Whoever wants to know the loss of each step and the row of each epoch; this one keeps nothing."""

    def begin(self, step: int) -> None:
        """Take note of the first step that is still to come: 0 for the model before any."""

    def loss(self, step: int, value: float) -> None:
        """Take the loss of a step, finite."""

    def rows(self, rows: Sequence[Row]) -> None:
        """Take the rows of all epochs up to now."""

    def flush(self) -> None:
        """Put everything where it outlives this process: its state is about to be saved."""


def check_tensorboard(folder: Path | None) -> None:
    """Raise UsageError or OutputError where no curves could be written."""
    if folder is None:
        return
    _writer_kind()
    if folder.exists() and not folder.is_dir():
        raise UsageError("--tensorboard takes a folder, and this is a file", path=folder)
    with _said(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError("cannot be written (no permission)", path=folder)


def curves_in(folder: Path | None) -> AbstractContextManager[Curves]:
    """Return the curves of a run, written into a folder that was checked; without one they are not kept."""
    return nullcontext(Curves()) if folder is None else TensorBoard(folder)


class TensorBoard(Curves, AbstractContextManager["TensorBoard"]):
    """Loss of each step; loss, learning rate and scores of each epoch, over steps.

    What stands in the folder of steps that are made again, after a run was killed or begun anew, is no longer shown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._next_epoch = 0

    def begin(self, step: int) -> None:
        is_known = any(self.folder.glob(EVENTS))
        # Rows before this step are there already, unless the run goes on in another folder.
        self._first = step if is_known else 0
        with _said(self.folder):
            self._writer = _writer_kind()(str(self.folder), purge_step=step)

    def loss(self, step: int, value: float) -> None:
        self._add("loss/step", value, step)

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.epoch >= self._next_epoch and row.step >= self._first:
                self._add_row(row)
        self._next_epoch = rows[-1].epoch + 1

    def flush(self) -> None:
        if self._writer is not None:
            with _said(self.folder):
                self._writer.flush()

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            with _said(self.folder):
                self._writer.close()

    def _add_row(self, row: Row) -> None:
        if row.loss is not None:
            self._add("loss/epoch", row.loss, row.step)
            self._add("lr", row.lr, row.step)
        for name, score in row.scores.items():
            self._add(f"score/{printable(name)}", score, row.step)

    def _add(self, tag: str, value: float, step: int) -> None:
        assert self._writer is not None, "it has begun"  # noqa: S101
        with _said(self.folder):
            self._writer.add_scalar(tag, value, step)


def _writer_kind() -> type[SummaryWriter]:
    """Return torch's writer, which takes a second to import. Raises UsageError without the package that it needs."""
    try:
        found: type[SummaryWriter] = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs tensorboard: pip install 'tcompress[tensorboard]'") from error
    return found


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Say in one line that the folder cannot be written."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", path=folder) from error
