"""A result appears under its name when it is complete, and not before.

Everything is written in a workspace beside the output, on the same disk; the last step is one rename. Whatever happens
before it, the workspace goes and the old state stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from tcompress.errors import OutputError

_CHECKPOINT_MARKS = ("*.safetensors", "*.index.json", "tcompress.json", "pytorch_model*.bin")


class Output:
    """The file or folder that a run will leave behind; a context manager.

    force: replace what is there. inputs: files and folders that must never be replaced.

    ``workspace`` is a folder for work in progress, ``draft`` the file or folder that ``commit`` gives its name.
    Raises OutputError when the output exists, cannot be written, or an OSError passes through the context.
    """

    def __init__(self, path: Path, *, is_folder: bool, force: bool, inputs: Iterable[Path]) -> None:
        self.path = path
        self.is_folder = is_folder
        self._force = force
        self._inputs = [source.resolve() for source in inputs]
        self.workspace = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self.draft = self.workspace / path.name

    def __enter__(self) -> Self:
        self.check()
        try:
            self.workspace.mkdir()
            if self.is_folder:
                self.draft.mkdir()
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.workspace, ignore_errors=True)
        if isinstance(error, OSError):
            raise self._failed(error) from error

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
            self._swap(self.workspace / "replaced")
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
