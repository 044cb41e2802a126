"""A result appears under its name when it is complete, and not before.

Everything is written in a workspace beside the output, on the same disk; the last step is one rename. Whatever happens
before it, the old state stays. The workspace goes too, unless a run was stopped that can go on from what lies in it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from tcompress.checkpoint.journal import JOURNAL, SPOOL
from tcompress.checkpoint.lock import lock
from tcompress.errors import OutputError, Stopped

_CHECKPOINT_MARKS = ("*.safetensors", "*.index.json", "tcompress.json", "pytorch_model*.bin")
STAGED = "staged.safetensors"  # between two forms of an output
STATE = "state"  # of a training run, from which it goes on
_LOCK, _REPLACED = "lock", "replaced"
_KEPT = {JOURNAL, SPOOL, STATE, _LOCK}  # of a stopped run


class Output:
    """The file or folder that a run will leave behind; a context manager.

    force: replace what is there. inputs: files and folders that must never be replaced.

    ``workspace`` is a folder for work in progress, ``draft`` the file or folder that ``commit`` gives its name. Where
    ``is_worth_keeping`` says so a signal leaves the workspace's journal for the next run; with ``keeps_after_errors``
    an error does, too.
    Raises OutputError when the output exists, cannot be written, or an OSError passes through the context, LockedError
    while another run writes the same output.
    """

    def __init__(self, path: Path, *, is_folder: bool, force: bool, inputs: Iterable[Path]) -> None:
        self.path = path
        self.is_folder = is_folder
        self.is_worth_keeping: Callable[[], bool] = lambda: False
        self.keeps_after_errors = False
        self._force = force
        self._inputs = [source.resolve() for source in inputs]
        self.workspace = path.parent / f".{path.name}.partial"
        self.draft = self.workspace / f"draft{path.suffix}"
        self._lock = -1

    def __enter__(self) -> Self:
        self.check()
        try:
            self._require_own_workspace()
            self.workspace.mkdir(exist_ok=True)
            self._lock = lock(self.workspace / _LOCK, self.path)
            self._sweep()
            if self.is_folder:
                self.draft.mkdir()
        except BaseException as error:
            self._leave(keep=False)
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        may_keep = isinstance(error, KeyboardInterrupt | Stopped) or (error is not None and self.keeps_after_errors)
        stopped = may_keep and self.is_worth_keeping()
        if stopped and error is not None:
            error.add_note(f"the same command goes on with what is finished; or delete {self.workspace}")
        self._leave(keep=stopped)
        if isinstance(error, OSError):
            raise self._failed(error) from error

    def _require_own_workspace(self) -> None:
        # A folder from a stranger may bring one along, and what is in a workspace is written and swept.
        if self.workspace.is_symlink():
            raise OutputError(f"{self.workspace} is a link; delete it", path=self.path)

    def _put_back(self) -> bool:
        """Give the old output its name again where a run was stopped before the new one had it."""
        aside = self.workspace / _REPLACED
        if not aside.exists() or os.path.lexists(self.path):
            return False
        aside.rename(self.path)
        return True

    def _sweep(self) -> None:
        """Take away what a killed run left half-written, and every link in the place of a file of ours."""
        if self._put_back():
            self.check()
        for path in self.workspace.iterdir():
            is_ours = path.name in {self.draft.name, STAGED, _REPLACED}
            if is_ours or (path.name in _KEPT and (path.is_symlink() or not path.is_file())):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _leave(self, *, keep: bool) -> None:
        if self._lock < 0:
            return
        with contextlib.suppress(OSError):
            self._put_back()
        if keep:
            with contextlib.suppress(OSError):
                self._sweep()
        else:
            shutil.rmtree(self.workspace, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def check(self) -> None:
        """Raise OutputError when the output could not be put in its place; nothing is written."""
        target = self.path.resolve()
        if any(source == target or target in source.parents for source in self._inputs):
            raise OutputError("is the input itself or holds it; choose another output", path=self.path)
        if not self.path.parent.is_dir():
            raise OutputError(f"the folder {self.path.parent} does not exist", path=self.path)
        if not os.access(self.path.parent, os.W_OK):
            raise OutputError(f"the folder {self.path.parent} cannot be written to", path=self.path)
        if not os.path.lexists(self.path):
            return
        if not self._force:
            raise OutputError("exists already; use --force to replace it, or another -o", path=self.path)
        if self.path.is_dir() != self.is_folder:
            raise OutputError(f"is a {'folder' if self.path.is_dir() else 'file'}; choose another -o", path=self.path)
        if self.is_folder and any(self.path.iterdir()) and not _holds_checkpoint(self.path):
            raise OutputError("is a folder without a checkpoint; it is not replaced, choose another -o", path=self.path)

    def require_space(self, nbytes: int) -> None:
        """Raise OutputError when the disk has not that much room."""
        free = shutil.disk_usage(self.path.parent).free
        if free < nbytes:
            raise OutputError(f"needs {nbytes} bytes, the disk has {free} left", path=self.path)

    def commit(self) -> None:
        """Give the draft its name, durably."""
        self.check()  # hours may have passed, and another run may have been faster
        if self.is_folder:
            for file in self.draft.rglob("*"):
                _sync(file)
            _sync(self.draft)
        if self.is_folder and self.path.exists():
            self._swap(self.workspace / _REPLACED)
        else:
            self.draft.replace(self.path)
        _sync(self.path.parent)

    def _swap(self, aside: Path) -> None:
        self.path.rename(aside)
        try:
            self.draft.replace(self.path)
        except BaseException:
            aside.rename(self.path)
            raise

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(f"cannot be written ({error.strerror or error})", path=self.path)


def _holds_checkpoint(folder: Path) -> bool:
    return any(next(folder.glob(mark), None) is not None for mark in _CHECKPOINT_MARKS)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        # Some file systems cannot sync a folder; the rename itself has happened all the same.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
