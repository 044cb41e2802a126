"""A function in a process of its own, which begins with nothing of this one's memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, resource_tracker
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from tcompress.errors import TaskError, TcompressError

_Answer = tuple[Any, BaseException | None, str]  # the result, or the error and its traceback
_GRACE_SECONDS = 5.0  # for a process that has answered and is tidying up


class _Elsewhere(Exception):  # noqa: N818 - never raised: it is the traceback of the other process
    """The traceback that an error has in the process it comes from."""


def in_fresh_process(function: Callable[..., Any], *arguments: Any, doing: str, path: Path) -> Any:
    """Return what a module-level function of picklable arguments returns in a new process.

    doing, path: what the process is at and the file whose code it runs, for the message when it dies.

    An error of this package, an OSError or a MemoryError is raised again here as it is. Raises TaskError when the
    process is killed or ends without an answer. Whatever stops this process stops the other too.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    # Not daemonic: such a process may have no children, and the loaders of many users' data have some.
    process = spawn.Process(target=_answer, args=(sender, function, arguments))
    grace = 0.0
    with receiver:
        try:
            with sender, _deaf_children():
                process.start()
            answer = _received(receiver, process)
            grace = _GRACE_SECONDS
        finally:
            _end(process, grace)
    if answer is None:
        raise TaskError(f"{doing}: {_death(process.exitcode)}", path=path)
    result, error, trace = answer
    if error is not None:
        raise error from _Elsewhere(f"\n{trace}")
    return result


def _answer(sender: connection.Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer: _Answer
    try:
        answer = (function(*arguments), None, "")
    except (TcompressError, OSError, MemoryError) as error:
        answer = (None, error, traceback.format_exc())
    except Exception as error:  # noqa: BLE001 - not every exception survives the way: its line does
        internal = TcompressError(f"internal error: {type(error).__name__}: {error}; --debug shows more")
        answer = (None, internal, traceback.format_exc())
    sender.send(answer)


def _received(receiver: connection.Connection, process: SpawnProcess) -> Any:
    # Not the pipe alone: a child of the process may hold its other end open.
    connection.wait([receiver, process.sentinel])
    if not receiver.poll():
        return None
    try:
        return receiver.recv()
    except EOFError:
        return None


def _end(process: SpawnProcess, grace: float) -> None:
    if process.pid is None:
        return
    try:
        process.join(grace)
    finally:
        if process.is_alive():
            process.kill()
            process.join()


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        name = {each.value: each.name for each in signal.Signals}.get(-code, f"signal {-code}")
        hint = ": there was probably not enough memory" if name == "SIGKILL" else ""
        return f"the process was killed by {name}{hint}"
    return f"the process ended with exit code {code} and no answer"


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Let processes that start in here not hear Ctrl-C, which reaches the whole group: this one ends them itself."""
    resource_tracker.ensure_running()  # it would unblock what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
