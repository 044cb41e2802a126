"""What can go wrong, said once: every error names the file, the tensor and the way out, and knows its exit code.

    TcompressError          1   anything below; on its own: an unexpected internal error
    +-- UsageError          2   a command line, option or plan that asks for something impossible
    |   +-- FormatError     2   a format's options that make no sense, or do not fit a weight
    +-- LimitError          3   a limit the user set was exceeded (the report is written all the same)
    +-- InputError          4   a file that is missing, damaged, hostile or not a checkpoint
    |   +-- UnsupportedError  4   a legal file that this version cannot read
    +-- SafetyError         5   more memory or space than a file of this size may claim
    +-- NumericalError      6   NaN or Inf in the weights
    +-- OutputError         7   the output cannot be written
    +-- VerifyError         8   a compressed checkpoint is not what it says it is
    +-- TaskError           9   a task file's code failed, or gave what it must not
    +-- LockedError        75   another run is writing the same output: try again later

130 and 143 are left for SIGINT and SIGTERM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def printable(text: str) -> str:
    r"""Return ``text`` with every control and other unprintable character escaped (``\n`` becomes ``\\n``).

    Names come from files that strangers wrote; a terminal must never obey them, nor a build server for which ``##``
    begins a command.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return shown.replace("##", r"#\x23")


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return the first names on a line, and how many more there are: a stranger's file may have any number."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class TcompressError(Exception):
    """An error with a reason and, where known, the file and the tensor it is about."""

    exit_code = 1

    def __init__(self, reason: str, *, path: Path | str | None = None, tensor: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path
        self.tensor = tensor

    def __str__(self) -> str:
        where = [] if self.path is None else [str(self.path)]
        where += [] if self.tensor is None else [f"tensor {self.tensor}"]
        return printable(": ".join([*where, self.reason]))


class UsageError(TcompressError):
    """The command line, an option or a plan asks for something impossible."""

    exit_code = 2


class FormatError(UsageError):
    """A format's options make no sense, or do not fit the weight."""


class LimitError(TcompressError):
    """A limit that the user set (``--max-error``, ``--max-bytes``, ``--min-ratio``) was exceeded."""

    exit_code = 3


class InputError(TcompressError):
    """A file is missing, damaged, hostile or no checkpoint at all."""

    exit_code = 4


class UnsupportedError(InputError):
    """A legal file holds something that this version cannot read."""


class SafetyError(TcompressError):
    """A file claims more memory or space than it may."""

    exit_code = 5


class NumericalError(TcompressError):
    """The weights hold NaN or Inf, or a computation produced them."""

    exit_code = 6


class OutputError(TcompressError):
    """The output exists, cannot be written, or the disk is full."""

    exit_code = 7


class VerifyError(TcompressError):
    """A compressed checkpoint does not hold what its manifest says."""

    exit_code = 8


class TaskError(TcompressError):
    """The code of a task file raised an exception, or gave something else than it must."""

    exit_code = 9


class LockedError(TcompressError):
    """Another run is writing the same output."""

    exit_code = 75


class Stopped(BaseException):
    """A signal asked this process to stop. Not KeyboardInterrupt, which the command line's library would answer."""
