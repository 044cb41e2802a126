"""The command line: its commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer

from tcompress.cli import (
    analyze,
    calibrate,
    compress,
    decompress,
    evaluate,
    export,
    finetune,
    formats,
    inspect,
    plan,
    verify,
)
from tcompress.errors import Stopped, TcompressError, printable
from tcompress.version import __version__

INTERNAL_ERROR, OUT_OF_MEMORY, SYSTEM_ERROR, INTERRUPTED, TERMINATED, BROKEN_PIPE = 1, 5, 7, 130, 143, 141

# Typer's errors of usage; its base lies in click, or in the copy of click that newer versions of Typer carry.
_UsageProblem: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="tcompress",
    help="Make released neural networks smaller without their training code.",
    epilog="Exit codes: 0 done, 2 usage, 3 a limit exceeded, 4 bad input, 5 too much memory, 6 NaN or Inf, "
    "7 output, 8 verify found a difference, 9 a task file failed, 75 another run has the output, 130 and 143 "
    "interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    inspect.inspect,
    analyze.analyze,
    calibrate.calibrate,
    plan.plan,
    compress.compress,
    decompress.decompress,
    verify.verify,
    evaluate.evaluate,
    finetune.finetune,
    export.export,
    formats.formats,
):
    app.command()(command)

_debug = False
_stopped_by: list[int] = []  # signals that asked this process to stop


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"tcompress {__version__}\n")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001 - the callback answers
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Make released neural networks smaller without their training code."""
    global _debug  # noqa: PLW0603 - one process runs one command
    _debug = debug


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; whatever goes wrong is one line on stderr."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    _stopped_by.clear()
    try:
        code = app(list(arguments), prog_name="tcompress", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the boundary: a person gets a line, not a traceback
        return _stopped(error) if _stopped_by else _answer(error)
    if _stopped_by:
        return _stopped(None)
    return code if isinstance(code, int) else 0


def _answer(error: BaseException) -> int:
    match error:
        case SystemExit(code=int(code)):
            return code
        case TcompressError():
            return _failed(str(error), error.exit_code)
        case _UsageProblem():
            return _usage(error)
        case BrokenPipeError():
            # The reader of our output has gone, as in `tcompress analyze | head`: no error, and not worth a word.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        case MemoryError():
            return _failed("not enough memory", OUT_OF_MEMORY)
        case OSError(filename=name, strerror=reason):
            return _failed(f"{name or 'system'}: {reason or error}", SYSTEM_ERROR)
    return _failed(f"internal error: {type(error).__name__}: {error}; --debug shows more", INTERNAL_ERROR)


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    _stopped_by.append(number)
    raise Stopped


def _stopped(error: BaseException | None) -> int:
    """Answer a signal, whatever exception it has become on its way: an import may turn it into any other."""
    said: list[str] = []
    while error is not None:
        said += getattr(error, "__notes__", ())
        error = error.__cause__ or error.__context__
    left = "; ".join(said) or "nothing was written"
    if _stopped_by[0] == signal.SIGTERM:
        return _failed(f"terminated; {left}", TERMINATED)
    return _failed(f"interrupted; {left}", INTERRUPTED)


def _usage(problem: Any) -> int:
    context = problem.ctx
    help_command = f"{context.command_path if context else 'tcompress'} --help"
    if type(problem).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(problem.format_message() + "\n")
        return 2
    message = problem.format_message()
    end = "" if message.endswith((".", "!", "?")) else "."
    return _failed(f"{message}{end} See '{help_command}'.", int(problem.exit_code))


def _failed(message: str, code: int) -> int:
    if _debug:
        traceback.print_exc()
    line = " ".join(printable(part) for part in message.split("\n"))
    sys.stderr.write(f"error: {line}\n")
    return code
