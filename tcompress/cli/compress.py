"""tcompress compress."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcompress.cli.options import (
    AllowNonfinite,
    Device,
    DTypeName,
    Exclude,
    Flops,
    Force,
    FormatName,
    Formats,
    Include,
    Inputs,
    Json,
    Keep,
    Key,
    MaxMemory,
    MaxShardSize,
    Model,
    OneThreshold,
    PlanFile,
    Rank,
    RankMultiple,
    RankRule,
    Seed,
    StripPrefix,
    TaskFile,
    Threads,
    Tolerance,
    parse_size,
    pick_device,
    pick_dtype,
)
from tcompress.errors import LimitError

if TYPE_CHECKING:
    from tcompress.report.documents import Document
    from tcompress.workflow.results import CompressionResult

Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File or folder to write; default: a name made from MODEL's, in this folder."),
]
SavePlan = Annotated[
    Path | None, typer.Option(help="Write the plan, a rule a layer, to be edited.", metavar="PLAN.json")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and the exact bytes, write no checkpoint.")]
Repair = Annotated[
    bool,
    typer.Option(help="With --task: set biases and normalisations anew where held-out inputs agree that it helps."),
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
    flops: Flops = None,
    rank_multiple: RankMultiple = 1,
    inputs: Inputs = None,
    task_file: TaskFile = None,
    strip_prefix: StripPrefix = "",
    repair: Repair = True,
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

    Without --format and --plan a plan is made for --keep, --flops or --max-bytes, over all formats. With --task each
    layer is fitted to give, behind the layers that are compressed before it, the output of the dense model; this runs
    the code in the task file.

    Example: tcompress compress model.safetensors --keep 0.25 -o small.safetensors
    """
    from tcompress.cli.choices import plan_asked_for, reconstruction_of, task_of
    from tcompress.cli.console import show
    from tcompress.cli.names import default_output
    from tcompress.cli.opened import opened
    from tcompress.cli.wanted import ToMake, wanted
    from tcompress.report.documents import compression_document
    from tcompress.report.tables import compression_view
    from tcompress.workflow import compression
    from tcompress.workflow.assumed import check_inputs
    from tcompress.workflow.settings import Settings

    started = time.perf_counter()
    check_inputs(inputs, are_known=task_file is not None)
    byte_limit, shard_bytes = parse_size(max_bytes, "--max-bytes"), parse_size(max_shard_size, "--max-shard-size")
    asked = plan_asked_for(
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
        inputs=inputs,
    )
    plan = wanted(
        asked,
        keep=keep,
        max_bytes=byte_limit,
        flops=flops,
        include=include,
        exclude=exclude,
        formats=formats,
        rank_multiple=rank_multiple,
        inputs=inputs,
    )
    settings = Settings(pick_dtype(dtype), pick_device(device), allow_nonfinite)
    _check_paths(report, save_plan)
    with opened(model, key=key, threads=threads, max_memory=max_memory) as (checkpoint, progress):
        target = out or default_output(model, "tcompress")
        if not dry_run:  # before a plan is made, which may take long
            compression.checked_output(checkpoint, target, force=force)
        task = task_of(task_file, strip_prefix)
        reconstruction = reconstruction_of(checkpoint, task, strip_prefix, settings.device, repair=repair)
        if isinstance(plan, ToMake):
            plan = plan.make(checkpoint, settings, reconstruction, shard_bytes, progress)
        run = compression.dry_run if dry_run else partial(compression.compress, out=target, force=force)
        result = run(
            checkpoint,
            plan,
            settings=settings,
            max_shard_bytes=shard_bytes,
            reconstruction=reconstruction,
            progress=progress,
        )
    result = replace(result, seconds=time.perf_counter() - started)
    exceeded = _exceeded(result, max_error, byte_limit, min_ratio)
    document = compression_document(result, exceeded)
    _write(document, report, save_plan)
    show(document, compression_view(document), as_json=as_json)
    if exceeded:
        raise LimitError("; ".join(exceeded), path=checkpoint.path)


def _check_paths(report: Path | None, save_plan: Path | None) -> None:
    from tcompress.report.writing import PLAN_SUFFIXES, REPORT_SUFFIXES, check_path

    check_path(report, REPORT_SUFFIXES)
    check_path(save_plan, PLAN_SUFFIXES)


def _write(document: Document, report: Path | None, save_plan: Path | None) -> None:
    from tcompress.report.writing import write_plan, write_report

    if save_plan is not None:
        write_plan(save_plan, document["plan"])
    if report is not None:
        write_report(report, document)


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
