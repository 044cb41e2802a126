"""What `compress` is to carry out: a plan that is asked for, or one that is made for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tcompress.checkpoint.reader import Checkpoint
from tcompress.cli.choices import planned_formats
from tcompress.errors import UsageError
from tcompress.formats import Format
from tcompress.workflow.budgeting import make_plan, matching
from tcompress.workflow.budgets import Budget
from tcompress.workflow.plan import Plan
from tcompress.workflow.progress import Progress
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.settings import Settings


@dataclass(frozen=True)
class ToMake:
    """A plan that is still to be made: for which budget, of which layers (globs), and from what."""

    budget: Budget
    include: Sequence[str]
    exclude: Sequence[str]
    formats: Sequence[type[Format]]
    rank_multiple: int
    inputs: str | None

    def make(
        self,
        checkpoint: Checkpoint,
        settings: Settings,
        reconstruction: Reconstruction | None,
        max_shard_bytes: int | None,
        progress: Progress,
    ) -> Plan:
        """Return the plan for a checkpoint. Arguments and errors are those of ``make_plan``."""
        made = make_plan(
            checkpoint,
            keep=self.budget.keep,
            max_bytes=self.budget.max_bytes,
            flops=self.budget.flops,
            layers=matching(checkpoint, self.include, self.exclude),
            formats=self.formats,
            settings=settings,
            rank_multiple=self.rank_multiple,
            reconstruction=reconstruction,
            inputs=self.inputs,
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        return made.plan


def wanted(
    asked: Plan | None,
    *,
    keep: float | None,
    max_bytes: int | None,
    flops: float | None,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    formats: str | None,
    rank_multiple: int,
    inputs: str | None,
) -> Plan | ToMake:
    """Return the plan that is asked for, or what the other options say of one to be made.

    Raises UsageError for options that contradict each other, or make no plan.
    """
    kinds = planned_formats(formats)
    if asked is None:
        return ToMake(_budget(keep, max_bytes, flops), include or (), exclude or (), kinds, rank_multiple, inputs)
    given = {"--formats": formats is not None, "--flops": flops is not None, "--rank-multiple": rank_multiple != 1}
    said = [name for name, is_given in given.items() if is_given]
    if said:
        raise UsageError(f"{' and '.join(said)} say how a plan is made; leave that out beside --format or --plan")
    return asked


def _budget(keep: float | None, max_bytes: int | None, flops: float | None) -> Budget:
    """Return what a plan is to be made for: --max-bytes beside another budget is a limit of the output alone."""
    if keep is not None or flops is not None:
        return Budget(keep=keep, flops=flops)
    if max_bytes is None:
        raise UsageError(
            "give --format or --plan, or --keep, --flops or --max-bytes alone, for which a plan is made; "
            "`tcompress formats` lists the formats"
        )
    return Budget(max_bytes=max_bytes)
