"""Whether the files that a run reads are still those that it began with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tcompress.errors import InputError


@dataclass(frozen=True)
class Witness:
    """What the file system said of the files when they were first looked at.

    status: path -> device, inode, size, time of the last write, time of the last change of any kind.
    """

    status: dict[Path, tuple[int, ...]]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Witness:
        """Look at the files. Raises InputError for one that is gone."""
        return cls({path: _status(path) for path in paths})

    def require_unchanged(self, is_same_content: Callable[[], bool] | None = None) -> None:
        """Raise InputError when a file is gone or was written.

        is_same_content: asked where only the time of the last change moved: a new link or another mode move it as
        well, and a write whose time was set back.
        """
        doubtful = False
        for path, before in self.status.items():
            now = _status(path)
            if now[:-1] != before[:-1]:
                raise InputError("was changed while it was read; run again", path=path)
            doubtful = doubtful or now != before
        if doubtful and is_same_content is not None and not is_same_content():
            raise InputError("was changed while it was read; run again", path=next(iter(self.status)))


def _status(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise InputError(f"has vanished while it was read ({error.strerror})", path=path) from error
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
