"""tcompress compress."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcompress.cli.options import (
    AllowNonfinite,
    Device,
    DTypeName,
    Exclude,
    Force,
    Formats,
    Include,
    Json,
    Keep,
    Key,
    MaxMemory,
    MaxShardSize,
    Model,
    Rank,
    Seed,
    StripPrefix,
    TaskFile,
    Threads,
    Tolerance,
    parse_size,
    pick_device,
    pick_dtype,
    set_threads,
)
from tcompress.errors import LimitError, UsageError

if TYPE_CHECKING:
    from tcompress.workflow.plan import Plan
    from tcompress.workflow.results import CompressionResult

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File or folder to write; default: a name made from MODEL's, in this folder."),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", help="A format, as svd or svd:rank=16; `tcompress formats` lists them.", metavar="FORMAT"
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Take formats layer by layer from this plan.", metavar="PLAN.json")
]
SavePlan = Annotated[
    Path | None, typer.Option(help="Write the plan, a rule a layer, to be edited.", metavar="PLAN.json")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the exact bytes, write no checkpoint.")]
RankRule = Annotated[
    str | None,
    typer.Option(
        help="svd: the rank by each layer's spectrum: evbmf, evbmf:WEAKENING or energy:SHARE.",
        metavar="RULE",
        rich_help_panel="How much",
    ),
]
OneThreshold = Annotated[
    bool, typer.Option("--global", help="sparse, lrs: one threshold over all layers; the budget is that of all.")
]
Report = Annotated[
    Path | None, typer.Option(help="Write a report, by its suffix JSON or Markdown.", metavar="FILE.json|.md")
]
MaxError = Annotated[
    float | None,
    typer.Option(help="Exit with 3 when a layer's relative error is larger.", min=0, rich_help_panel="Limits"),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(help="Exit with 3 when the output is larger, as 10MB.", metavar="SIZE", rich_help_panel="Limits"),
]
MinRatio = Annotated[
    float | None,
    typer.Option(help="Exit with 3 when dense / stored bytes is smaller.", min=0, rich_help_panel="Limits"),
]


def compress(
    model: Model = Path(),
    out: Out = None,
    format_name: FormatName = None,
    rank: Rank = None,
    keep: Keep = None,
    tolerance: Tolerance = None,
    rank_rule: RankRule = None,
    include: Include = None,
    exclude: Exclude = None,
    one_threshold: OneThreshold = False,
    plan_file: PlanFile = None,
    formats: Formats = None,
    task_file: TaskFile = None,
    strip_prefix: StripPrefix = "",
    save_plan: SavePlan = None,
    dry_run: DryRun = False,
    dtype: DTypeName = None,
    max_shard_size: MaxShardSize = None,
    max_error: MaxError = None,
    max_bytes: MaxBytes = None,
    min_ratio: MinRatio = None,
    report: Report = None,
    key: Key = None,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a smaller checkpoint: layer by layer, never larger than dense, its errors measured on what is stored.

    Without --format and --plan a plan is made for --keep or --max-bytes, over all formats. With --task each layer is
    fitted to give, behind the layers that are compressed before it, the output of the dense model; this runs the code
    in the task file.

    Example: tcompress compress model.safetensors --keep 0.25 -o small.safetensors
    """
    from tcompress.checkpoint.memory import limited
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.choices import planned_formats, reconstruction_of
    from tcompress.cli.console import progress_bar, show
    from tcompress.cli.names import default_output
    from tcompress.report.documents import compression_document
    from tcompress.report.tables import compression_view
    from tcompress.report.writing import PLAN_SUFFIXES, REPORT_SUFFIXES, check_path, write_plan, write_report
    from tcompress.workflow import compression
    from tcompress.workflow.budgeting import make_plan, matching
    from tcompress.workflow.settings import Settings

    asked = _plan(
        plan_file,
        format_name,
        include,
        exclude,
        one_threshold,
        rank=rank,
        keep=keep,
        tolerance=tolerance,
        seed=seed,
        rank_rule=rank_rule,
    )
    if asked is None and keep is None and max_bytes is None:
        raise UsageError(
            "give --format or --plan, or --keep or --max-bytes alone, for which a plan is made; "
            "`tcompress formats` lists the formats"
        )
    if asked is not None and formats is not None:
        raise UsageError("--formats is what a plan chooses from; leave it out beside --format or --plan")
    kinds = planned_formats(formats)
    settings = Settings(pick_dtype(dtype), pick_device(device), allow_nonfinite)
    shard_bytes, byte_limit = parse_size(max_shard_size, "--max-shard-size"), parse_size(max_bytes, "--max-bytes")
    check_path(report, REPORT_SUFFIXES)
    check_path(save_plan, PLAN_SUFFIXES)
    set_threads(threads)
    memory = parse_size(max_memory, "--max-memory")
    with limited(memory), open_checkpoint(model, key=key) as checkpoint, progress_bar() as progress:
        reconstruction = reconstruction_of(checkpoint, task_file, strip_prefix, settings.device)
        plan = (
            asked
            or make_plan(
                checkpoint,
                keep=keep,
                max_bytes=None if keep is not None else byte_limit,
                layers=matching(checkpoint, include or (), exclude or ()),
                formats=kinds,
                settings=settings,
                reconstruction=reconstruction,
                progress=progress,
            ).plan
        )
        if dry_run:
            result = compression.dry_run(
                checkpoint, plan, settings=settings, max_shard_bytes=shard_bytes, progress=progress
            )
        else:
            result = compression.compress(
                checkpoint,
                plan,
                out=out or default_output(model, "tcompress"),
                settings=settings,
                force=force,
                max_shard_bytes=shard_bytes,
                reconstruction=reconstruction,
                progress=progress,
            )
    exceeded = _exceeded(result, max_error, byte_limit, min_ratio)
    document = compression_document(result, exceeded)
    if save_plan is not None:
        write_plan(save_plan, document["plan"])
    if report is not None:
        write_report(report, document)
    show(document, compression_view(document), as_json=as_json)
    if exceeded:
        raise LimitError("; ".join(exceeded), path=checkpoint.path)


def _plan(
    plan_file: Path | None,
    format_name: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    one_threshold: bool,
    *,
    rank: int | None,
    keep: float | None,
    tolerance: float | None,
    seed: int,
    rank_rule: str | None,
) -> Plan | None:
    """Return the plan that the options say; None where one is to be made."""
    from tcompress.cli.choices import choices
    from tcompress.workflow.plan import plan_for, read_plan

    if plan_file is not None and format_name is not None:
        raise UsageError("give --format or --plan, not both")
    if plan_file is None and format_name is None:
        if any(each is not None for each in (rank, tolerance, rank_rule)) or one_threshold:
            raise UsageError(
                "--rank, --tolerance and --global go with --format; a plan is made for --keep or --max-bytes"
            )
        return None
    if format_name is not None:
        (choice,) = choices([format_name], rank=rank, keep=keep, tolerance=tolerance, seed=seed, rank_rule=rank_rule)
        return plan_for(choice, include=include or (), exclude=exclude or (), one_threshold=one_threshold)
    if include or exclude or one_threshold or any(budget is not None for budget in (rank, keep, tolerance, rank_rule)):
        raise UsageError("--plan says everything about layers and formats; leave the other options to it")
    assert plan_file is not None  # noqa: S101
    return read_plan(plan_file)


def _exceeded(
    result: CompressionResult, max_error: float | None, max_bytes: int | None, min_ratio: float | None
) -> list[str]:
    """Say which limits the result does not keep."""
    problems = []
    if max_error is not None and result.largest_error > max_error:
        worst = max(result.layers, key=lambda layer: layer.relative_error or 0.0)
        problems.append(
            f"layer {worst.layer.name} has an error of {result.largest_error:g}, --max-error is {max_error:g}"
        )
    if max_bytes is not None and result.stored_bytes > max_bytes:
        problems.append(f"the output has {result.stored_bytes} bytes, --max-bytes is {max_bytes}")
    if min_ratio is not None and result.compression_ratio < min_ratio:
        problems.append(f"the compression ratio is {result.compression_ratio:.3f}, --min-ratio is {min_ratio:g}")
    return problems
