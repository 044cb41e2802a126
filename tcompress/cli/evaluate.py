"""tcompress evaluate."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tcompress.cli.options import Json, Key, Model, Threads, pick_device, set_threads


class Caching(StrEnum):
    """Whether factorised layers keep their dense weight; the words of ``load_into``."""

    NEVER = "never"
    AUTO = "auto"
    ALWAYS = "always"


TaskFile = Annotated[
    str,
    typer.Option(
        "--task",
        help="Python file with model() and evaluate(model), or an object in it that has them. ITS CODE IS RUN.",
        metavar="TASK.py[:NAME]",
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(help="The checkpoint it was made from; default: its own weights, decompressed.", metavar="MODEL"),
]
StripPrefix = Annotated[
    str,
    typer.Option(help="What the names in the files begin with and the model's do not, such as 'module.'", metavar="P"),
]
Cache = Annotated[Caching, typer.Option(help="Whether factorised layers keep the dense weight they are worth.")]
Device = Annotated[
    str,
    typer.Option(
        help="Where the models are: auto, cpu, cuda or cuda:N; evaluate(model) takes its data there.", metavar="DEVICE"
    ),
]
Report = Annotated[
    Path | None, typer.Option(help="Write a report, by its suffix JSON or Markdown.", metavar="FILE.json|.md")
]


def evaluate(
    task_file: TaskFile,
    model: Model = Path(),
    against: Against = None,
    strip_prefix: StripPrefix = "",
    cache: Cache = Caching.AUTO,
    report: Report = None,
    key: Key = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure what a compressed model is worth: scores, bytes, latency and memory beside the dense one's.

    This runs the code in the task file, and that of whatever it imports: give it files that you would run yourself.
    A task file has two functions, model() -> torch.nn.Module and evaluate(model) -> a number or a dict of numbers.

    Example: tcompress evaluate small.safetensors --task task.py --against model.safetensors
    """
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import show
    from tcompress.report.evaluation import evaluation_document, evaluation_view, write_evaluation
    from tcompress.report.writing import REPORT_SUFFIXES, check_path
    from tcompress.workflow import evaluation
    from tcompress.workflow.task import load_task

    chosen = pick_device(device)
    set_threads(threads)
    check_path(report, REPORT_SUFFIXES)
    task = load_task(task_file, evaluation.NEEDS, evaluation.USES)
    with open_checkpoint(model) as checkpoint:
        original = None if against is None else open_checkpoint(against, key=key)
        result = evaluation.evaluate(
            checkpoint, task, against=original, strip_prefix=strip_prefix, cache=cache, device=chosen
        )
    document = evaluation_document(result)
    if report is not None:
        write_evaluation(report, document)
    show(document, evaluation_view(document), as_json=as_json)
