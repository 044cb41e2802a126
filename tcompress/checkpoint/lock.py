"""One run at a time for one output: an advisory lock that dies with its holder, so that none is ever stale."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from tcompress.errors import LockedError

_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


def lock(path: Path, output: Path) -> int:
    """Return the descriptor of ``path``, locked until it is closed; its text is the number of this process.

    Raises LockedError while another process holds it. Some network file systems have no locks: there the file alone
    is made, and two runs are on their own.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
                os.close(handle)
                raise LockedError(
                    f"is being written by another run (process {holder or 'unknown'})", path=output
                ) from error
        if _is_still(path, handle):
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode("ascii"), 0)
            return handle
        os.close(handle)  # the holder finished and took the file away between the two steps


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
