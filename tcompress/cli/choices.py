"""From --format, --rank, --keep and --tolerance to what is to be fitted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import UsageError
from tcompress.formats import FORMATS, Format, find_format, make, parse
from tcompress.formats.grouped import GroupFormat
from tcompress.workflow.analysis import USUAL_BUDGETS
from tcompress.workflow.assumed import SMOOTH
from tcompress.workflow.plan import Plan, Target, plan_for, read_plan
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.task import Task, load_task
from tcompress.workflow.tracing import NEEDS


def choices(
    formats: Sequence[str],
    *,
    rank: int | None,
    keep: float | None,
    tolerance: float | None,
    seed: int,
    rank_rule: str | None = None,
) -> list[Format | Target]:
    """Return what each ``--format`` asks for together with the one budget that stands beside it.

    Raises UsageError when there is none or more than one, or the format has no such thing as a rank.
    """
    if sum(budget is not None for budget in (rank, keep, tolerance)) > 1:
        raise UsageError("give one of --rank, --keep and --tolerance, they are three ways to say how much is kept")
    if rank_rule is not None:
        if any(budget is not None for budget in (rank, keep, tolerance)):
            raise UsageError("--rank-rule says the ranks; leave out --rank, --keep and --tolerance")
        return [_by_rule(text, rank_rule, seed) for text in formats]
    return [_choice(text, rank, keep, tolerance, seed) for text in formats]


def plan_asked_for(
    plan_file: Path | None,
    format_name: str | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    one_threshold: bool,
    *,
    rank: int | None,
    keep: float | None,
    tolerance: float | None,
    seed: int,
    rank_rule: str | None = None,
    inputs: str | None = None,
) -> Plan | None:
    """Return the plan that --plan, or --format with what stands beside it, says; None where one is to be made.

    Raises UsageError for options that contradict each other, and for a plan that cannot be read.
    """
    if plan_file is not None and format_name is not None:
        raise UsageError("give --format or --plan, not both")
    if plan_file is None and format_name is None:
        if any(each is not None for each in (rank, tolerance, rank_rule)) or one_threshold:
            raise UsageError(
                "--rank, --tolerance and --global go with --format; a plan is made for --keep, --flops or --max-bytes"
            )
        return None
    if format_name is not None:
        (choice,) = choices([format_name], rank=rank, keep=keep, tolerance=tolerance, seed=seed, rank_rule=rank_rule)
        smooth = SMOOTH if inputs == SMOOTH else None
        return plan_for(
            choice, include=include or (), exclude=exclude or (), one_threshold=one_threshold, inputs=smooth
        )
    said = (rank, keep, tolerance, rank_rule, inputs)
    if include or exclude or one_threshold or any(each is not None for each in said):
        raise UsageError("--plan says everything about layers and formats; leave the other options to it")
    assert plan_file is not None  # noqa: S101
    return read_plan(plan_file)


def at_usual_sizes(formats: Sequence[str], *, seed: int) -> list[Format | Target]:
    """Return what each ``--format`` asks for; those that do not say their size at a few fractions of the bytes."""
    found: list[Format | Target] = []
    for text in formats:
        format_type, options = parse(text)
        is_sized = bool(format_type.amounts() & set(options)) or format_type.suffices(options)
        for keep in [None] if is_sized else USUAL_BUDGETS:
            found += choices([text], rank=None, keep=keep, tolerance=None, seed=seed)
    return found


def quick_formats(*, with_rank: bool) -> list[str]:
    """Return the formats that are fitted in seconds, of those that have a rank when one is asked for."""
    quick = [name for name, format_type in FORMATS.items() if format_type.quick]
    return [name for name in quick if not with_rank or FORMATS[name].rank_option is not None]


def planned_formats(text: str | None) -> list[type[Format]]:
    """Return the formats that ``--formats svd,sparse`` names; none without it. Raises UsageError for unknown ones."""
    kinds = [] if text is None else [find_format(name.strip()) for name in text.split(",")]
    together = [kind.name for kind in kinds if issubclass(kind, GroupFormat)]
    if together:
        raise UsageError(f"--formats: {together[0]} is for several layers at once, which a plan does not choose")
    return kinds


def task_of(task_file: str | None, strip_prefix: str, needs: Sequence[str] = NEEDS) -> Task | None:
    """Return the task of ``--task``, which must have these functions; None without it."""
    if task_file is not None:
        return load_task(task_file, needs)
    if strip_prefix:
        raise UsageError("--strip-prefix is about the model of a task; give --task")
    return None


def reconstruction_of(
    checkpoint: Checkpoint, task: Task | None, strip_prefix: str, device: torch.device, *, repair: bool = True
) -> Reconstruction | None:
    """Return the model of a task with its calibration inputs; None without one."""
    if task is not None:
        return Reconstruction(checkpoint, task, strip_prefix=strip_prefix, device=device, repair=repair)
    if not repair:
        raise UsageError("--no-repair is about what --task repairs; give --task")
    return None


def _by_rule(text: str, rank_rule: str, seed: int) -> Target:
    format_type, options = parse(text)
    return Target(format_type, {**_seed(format_type, seed), **options}, rank_rule=rank_rule)


def _choice(text: str, rank: int | None, keep: float | None, tolerance: float | None, seed: int) -> Format | Target:
    format_type, options = parse(text)
    options = {**_seed(format_type, seed), **options}
    size = format_type.size_option
    budget = next(
        (name for name, value in (("rank", rank), ("keep", keep), ("tolerance", tolerance)) if value is not None), None
    )
    given = format_type.amounts() & set(options)
    if (
        given
        and budget is not None
        and (rank is None or format_type.rank_option in format_type.amounts() | set(options))
    ):
        raise UsageError(f"--format {text} says its {min(given)} already; leave out --{budget}")
    if budget is None and (given or format_type.suffices(options)):
        return make(format_type, options)
    if rank is not None and format_type.rank_option is None:
        raise UsageError(
            f"{format_type.name} has no rank; use --keep, --tolerance or --format {format_type.name}:{size}=..."
        )
    if rank is not None:
        return make(format_type, {**options, str(format_type.rank_option): rank})
    if budget is None:
        own = "--rank" if format_type.rank_option is not None else f"--format {format_type.name}:{size}=..."
        raise UsageError(f"how much is to be kept? give {own}, --keep or --tolerance")
    return Target(format_type, options, keep=keep, tolerance=tolerance)


def _seed(format_type: type[Format], seed: int) -> dict[str, Any]:
    return {"seed": seed} if "seed" in format_type.option_defaults() else {}
