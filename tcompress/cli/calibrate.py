"""tcompress calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcompress.cli.options import Device, Force, Json, Key, Model, Threads, pick_device, set_threads

TaskFile = Annotated[
    str,
    typer.Option(
        "--task",
        help="Python file with model() and calibration_batches(), or an object in it that has them. ITS CODE IS RUN.",
        metavar="TASK.py[:NAME]",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="File to write; default: NAME.stats.safetensors here.", metavar="STATS", show_default=False
    ),
]
StripPrefix = Annotated[
    str,
    typer.Option(help="What the names in the files begin with and the model's do not, such as 'module.'", metavar="P"),
]


def calibrate(
    task_file: TaskFile,
    model: Model = Path(),
    out: Out = None,
    strip_prefix: StripPrefix = "",
    key: Key = None,
    device: Device = "cpu",
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure what the layers of a dense model get as input, and how much each channel of their output matters.

    This runs the code in the task file, and that of whatever it imports: give it files that you would run yourself.
    A task file has two functions, model() -> torch.nn.Module and calibration_batches() -> inputs of the model; with
    loss(model, batch) and train_batches() sensitivities are those of the loss, else those of the model's output.

    Example: tcompress calibrate model.safetensors --task task.py -o stats.safetensors
    """
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import progress_bar, show
    from tcompress.report.calibration import calibration_document, calibration_view
    from tcompress.workflow import calibration
    from tcompress.workflow.task import load_task

    chosen = pick_device(device)
    set_threads(threads)
    task = load_task(task_file, calibration.NEEDS, calibration.USES)
    with open_checkpoint(model, key=key) as checkpoint, progress_bar() as progress:
        result = calibration.calibrate_to(
            checkpoint,
            task,
            out=out or _default_output(model),
            force=force,
            strip_prefix=strip_prefix,
            device=chosen,
            progress=progress,
        )
    document = calibration_document(result)
    show(document, calibration_view(document), as_json=as_json)


def _default_output(model: Path) -> Path:
    """Return a file's name for folders too: statistics are one file."""
    from tcompress.checkpoint.opening import SAFETENSORS_SUFFIX
    from tcompress.cli.names import default_output

    made = default_output(model, "stats")
    return made if made.suffix == SAFETENSORS_SUFFIX else made.with_name(made.name + SAFETENSORS_SUFFIX)
