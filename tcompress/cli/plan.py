"""tcompress plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcompress.cli.options import (
    AllowNonfinite,
    Device,
    DTypeName,
    Exclude,
    Flops,
    Formats,
    Include,
    Inputs,
    Json,
    Keep,
    Key,
    MaxMemory,
    Model,
    RankMultiple,
    StripPrefix,
    TaskFile,
    Threads,
    parse_size,
    pick_device,
    pick_dtype,
)
from tcompress.errors import UsageError

if TYPE_CHECKING:
    from tcompress.workflow.budgets import Budget

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Write the plan here, to be edited and given to compress --plan.", metavar="JSON"),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(help="Size of the whole compressed file, as 10MB.", metavar="SIZE", rich_help_panel="How much"),
]
MaxError = Annotated[
    float | None,
    typer.Option(
        help="Largest relative error of any layer (with --task or --stats of its output), at the fewest bytes.",
        metavar="E",
        min=0,
        rich_help_panel="How much",
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="With --task: how far the first score that its evaluate() gives may fall, in that score's own unit.",
        metavar="D",
        min=0,
        rich_help_panel="How much",
    ),
]
MaxEvaluations = Annotated[
    int, typer.Option(help="How many plans --max-drop compresses and evaluates at most.", metavar="N", min=1)
]
Stats = Annotated[
    Path | None,
    typer.Option(help="What `tcompress calibrate` wrote of this model, in the place of --task.", metavar="STATS"),
]
Explain = Annotated[
    str | None, typer.Option(help="Show what this layer could have been, and at which loss.", metavar="LAYER")
]
EVALUATIONS = ".evaluations.json"  # in the place of the plan's suffix


def plan(
    model: Model = Path(),
    out: Out = None,
    keep: Keep = None,
    max_bytes: MaxBytes = None,
    max_error: MaxError = None,
    flops: Flops = None,
    max_drop: MaxDrop = None,
    max_evaluations: MaxEvaluations = 8,
    task_file: TaskFile = None,
    strip_prefix: StripPrefix = "",
    stats: Stats = None,
    formats: Formats = None,
    rank_multiple: RankMultiple = 1,
    inputs: Inputs = None,
    include: Include = None,
    exclude: Exclude = None,
    explain: Explain = None,
    dtype: DTypeName = None,
    key: Key = None,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """Find what to do with each layer within one budget: over all formats, settings and stored types.

    With --task errors are those of the layers' outputs on its calibration_batches(), weighed by what they do to the
    model's. This runs the code in the task file.

    With --max-drop plans are compressed and evaluated on the way to the smallest that scores well enough; their scores
    are kept beside the plan and not measured again.

    Example: tcompress plan model.safetensors --keep 0.25 -o plan.json
    """
    from tcompress.checkpoint.statistics_file import read_statistics
    from tcompress.cli.choices import planned_formats, reconstruction_of, task_of
    from tcompress.cli.console import show
    from tcompress.cli.opened import opened
    from tcompress.report.planning import planning_document, planning_view
    from tcompress.report.writing import PLAN_SUFFIXES, check_path, write_plan
    from tcompress.workflow import drop, tracing
    from tcompress.workflow.assumed import check_inputs
    from tcompress.workflow.budgeting import choose, matching, usual_inputs
    from tcompress.workflow.choices import choices_of
    from tcompress.workflow.evaluations import Evaluations
    from tcompress.workflow.settings import Settings

    budget = _budget(max_drop, keep, parse_size(max_bytes, "--max-bytes"), max_error, flops)
    settings, kinds = Settings(pick_dtype(dtype), pick_device(device), allow_nonfinite), planned_formats(formats)
    _require_one_source(task_file, stats, max_drop)
    check_inputs(inputs, are_known=task_file is not None or stats is not None)
    check_path(out, PLAN_SUFFIXES)
    evaluations = Evaluations(None if out is None or max_drop is None else out.with_suffix(EVALUATIONS))
    statistics = None if stats is None else read_statistics(stats)
    with opened(model, key=key, threads=threads, max_memory=max_memory) as (checkpoint, progress):
        layers = matching(checkpoint, include or (), exclude or ())
        task = task_of(task_file, strip_prefix, tracing.NEEDS if max_drop is None else drop.NEEDS)
        reconstruction = reconstruction_of(checkpoint, task, strip_prefix, settings.device)
        choices = choices_of(
            checkpoint,
            layers=layers,
            formats=kinds,
            settings=settings,
            rank_multiple=rank_multiple,
            reconstruction=reconstruction,
            statistics=statistics,
            for_flops=flops is not None,
            inputs=inputs or usual_inputs(budget),
            progress=progress,
        )
        if budget is not None:
            found = choose(choices, budget)
        else:
            assert max_drop is not None and task is not None and reconstruction is not None  # noqa: S101, PT018
            trials = drop.Trials(choices, reconstruction, task, settings, strip_prefix, evaluations, progress)
            found = drop.plan_within_drop(trials, max_drop, most=max_evaluations)
        document = planning_document(checkpoint.path, found, explain)
    if out is not None:
        write_plan(out, document["plan"])
    show(document, planning_view(document), as_json=as_json)


def _budget(
    max_drop: float | None, keep: float | None, max_bytes: int | None, max_error: float | None, flops: float | None
) -> Budget | None:
    """Return the one budget that is given; None for --max-drop, which looks for one."""
    from tcompress.workflow.budgets import ONE_BUDGET, Budget

    if max_drop is None:
        return Budget(keep, max_bytes, max_error, flops)
    if any(other is not None for other in (keep, max_bytes, max_error, flops)):
        raise UsageError(ONE_BUDGET)
    return None


def _require_one_source(task_file: str | None, stats: Path | None, max_drop: float | None) -> None:
    """Raise UsageError where it is not said, or said twice, what the layers' inputs are."""
    if stats is not None and task_file is not None:
        raise UsageError("give --task or --stats: both say what the layers' inputs are")
    if max_drop is not None and task_file is None:
        raise UsageError("--max-drop evaluates what it plans; give --task, a file that has evaluate(model) as well")
