"""tcompress plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcompress.cli.options import (
    Device,
    DTypeName,
    Exclude,
    Formats,
    Include,
    Json,
    Keep,
    Key,
    MaxMemory,
    Model,
    StripPrefix,
    TaskFile,
    Threads,
    parse_size,
    pick_device,
    pick_dtype,
    set_threads,
)
from tcompress.errors import UsageError

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the plan here, to be edited and given to compress --plan.", metavar="JSON"),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(help="Size of the whole compressed file, as 10MB.", metavar="SIZE", rich_help_panel="How much"),
]
Stats = Annotated[
    Path | None,
    typer.Option(help="What `tcompress calibrate` wrote of this model, in the place of --task.", metavar="STATS"),
]
Explain = Annotated[
    str | None, typer.Option(help="Show what this layer could have been, and at which loss.", metavar="LAYER")
]


def plan(
    model: Model = Path(),
    out: Out = None,
    keep: Keep = None,
    max_bytes: MaxBytes = None,
    task_file: TaskFile = None,
    strip_prefix: StripPrefix = "",
    stats: Stats = None,
    formats: Formats = None,
    include: Include = None,
    exclude: Exclude = None,
    explain: Explain = None,
    dtype: DTypeName = None,
    key: Key = None,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """Find what to do with each layer within one budget: over all formats, settings and stored types.

    With --task errors are those of the layers' outputs on its calibration_batches(), weighed by what they do to the
    model's. This runs the code in the task file.

    Example: tcompress plan model.safetensors --keep 0.25 -o plan.json
    """
    from tcompress.checkpoint.memory import limited
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.checkpoint.statistics_file import read_statistics
    from tcompress.cli.choices import planned_formats, reconstruction_of
    from tcompress.cli.console import progress_bar, show
    from tcompress.report.planning import planning_document, planning_view
    from tcompress.report.writing import PLAN_SUFFIXES, check_path, write_plan
    from tcompress.workflow.budgeting import make_plan, matching
    from tcompress.workflow.settings import Settings

    settings = Settings(pick_dtype(dtype), pick_device(device))
    byte_limit = parse_size(max_bytes, "--max-bytes")
    kinds = planned_formats(formats)
    if stats is not None and task_file is not None:
        raise UsageError("give --task or --stats: both say what the layers' inputs are")
    statistics = None if stats is None else read_statistics(stats)
    check_path(out, PLAN_SUFFIXES)
    set_threads(threads)
    memory = parse_size(max_memory, "--max-memory")
    with limited(memory), open_checkpoint(model, key=key) as checkpoint, progress_bar() as progress:
        layers = matching(checkpoint, include or (), exclude or ())
        found = make_plan(
            checkpoint,
            keep=keep,
            max_bytes=byte_limit,
            layers=layers,
            formats=kinds,
            settings=settings,
            reconstruction=reconstruction_of(checkpoint, task_file, strip_prefix, settings.device),
            statistics=statistics,
            progress=progress,
        )
        document = planning_document(checkpoint.path, found, explain)
    if out is not None:
        write_plan(out, document["plan"])
    show(document, planning_view(document), as_json=as_json)
