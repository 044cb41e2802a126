"""What a person sees: results on stdout, progress and notes on stderr, and nothing but results when nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tcompress.errors import printable
from tcompress.report.documents import Document
from tcompress.report.writing import json_text
from tcompress.training.watching import Moment, Watch, unwatched
from tcompress.workflow.progress import Progress, Step, silent

_UNBOUNDED = 100_000  # columns when the output is a file or a pipe: nothing in a log should fold


def show(document: Document, view: RenderableType, *, as_json: bool) -> None:
    """Print a result: the document as JSON, or its view."""
    if as_json:
        sys.stdout.write(json_text(document))
        return
    console = Console(highlight=False)
    if _is_watched(console):
        console.print(view)
        return
    wide = Console(highlight=False, width=_UNBOUNDED, force_terminal=False)
    with wide.capture() as written:
        wide.print(view)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in written.get().splitlines()))


def _is_watched(console: Console) -> bool:
    """Tell whether a person looks at it; the environment may claim so of a log as well, as FORCE_COLOR does."""
    return console.is_terminal and console.file.isatty()


def complain(message: str) -> None:
    """Print a line on stderr."""
    sys.stderr.write(printable(message) + "\n")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show layer i of n, bytes and the time left on stderr, if that is a terminal."""
    console = Console(stderr=True)
    if not _is_watched(console):
        yield silent
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[layer]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(step: Step) -> None:
            if step.task not in tasks:
                tasks[step.task] = bars.add_task(step.task, total=step.total_bytes, layer="")
            layer = f"layer {step.position} of {step.count} {printable(step.layer)}"
            bars.update(tasks[step.task], completed=step.done_bytes, layer=layer)

        yield tell


@contextmanager
def training_bar() -> Iterator[Watch]:
    """Show epoch, step, loss, score and the time left on stderr, if that is a terminal."""
    console = Console(stderr=True)
    if not _is_watched(console):
        yield unwatched
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        shown = bars.add_task("training", total=None, figures="")

        def tell(moment: Moment) -> None:
            epoch = f"epoch {moment.epoch}" + ("" if moment.epochs is None else f" of {moment.epochs}")
            loss = "" if moment.loss is None else f"loss {moment.loss:.4g}, "
            name, score = moment.score
            figures = f"{loss}{printable(name)} {score:.5g}"
            bars.update(shown, description=epoch, completed=moment.step, total=moment.steps, figures=figures)

        yield tell
