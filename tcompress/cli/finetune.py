"""tcompress finetune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcompress.cli.options import (
    DTypeName,
    Exclude,
    Force,
    FormatName,
    Include,
    Json,
    Keep,
    Key,
    Model,
    PlanFile,
    Rank,
    StripPrefix,
    Threads,
    Tolerance,
    pick_device,
    pick_dtype,
    set_threads,
)
from tcompress.errors import NumericalError, UsageError

if TYPE_CHECKING:
    from tcompress.training.tuning import TuningResult

_LEARNING, _DISTILL, _ENDING = "How it learns", "--method distill, prune, iterate:by=distill", "When it ends"

TaskFile = Annotated[
    str,
    typer.Option(
        "--task",
        help="Python file with model(), train_batches(), loss(model, batch) and evaluate(model), or an object in it "
        "that has them. ITS CODE IS RUN.",
        metavar="TASK.py[:NAME]",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="File or folder to write; default: a name made from MODEL's, in this folder."),
]
MethodName = Annotated[
    str,
    typer.Option(
        "--method",
        help="finetune: the task's loss; distill: beside it the outputs of the dense model; reconstruct: what each "
        "layer or block of the dense model gives, without labels; prune: as distill, while the dense MODEL is pruned "
        "down to a plan; iterate: compress a few layers of the dense MODEL a little, train, and again; lc: the weights "
        "of the dense MODEL, drawn to what they compress to; from-scratch: the task's loss, from random factors. "
        "Options of a method stand behind it, as distill:alpha=0.5.",
        metavar="METHOD[:OPTION=VALUE...]",
        rich_help_panel=_LEARNING,
    ),
]
Teacher = Annotated[
    Path | None,
    typer.Option(
        help="distill, reconstruct, prune: the dense checkpoint that is learnt from; default: that of --against, or "
        "the task's teacher().",
        metavar="MODEL",
        rich_help_panel=_LEARNING,
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        help="The part of the task's loss, beside the teacher's outputs [0.9].",
        metavar="X",
        rich_help_panel=_DISTILL,
    ),
]
Temperature = Annotated[
    float | None, typer.Option(help="What logits are divided by [3].", metavar="T", rich_help_panel=_DISTILL)
]
Init = Annotated[
    str | None,
    typer.Option(
        "--init", help="from-scratch: how factors begin: random, the default.", metavar="HOW", rich_help_panel=_LEARNING
    ),
]
Direction = Annotated[
    str | None,
    typer.Option(
        "--kl-direction",
        help="student-teacher, as the low-rank-plus-sparse paper has it (the default), or teacher-student.",
        metavar="WAY",
        rich_help_panel=_DISTILL,
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(
        help="The dense checkpoint it was made from: its score is told, and errors are known.", metavar="MODEL"
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(help="Passes over the batches; default: the method's.", metavar="N", min=1, rich_help_panel=_ENDING),
]
Steps = Annotated[
    int | None,
    typer.Option(help="Steps of the optimizer, at most.", metavar="N", min=1, rich_help_panel=_ENDING),
]
MaxHours = Annotated[
    float | None,
    typer.Option(help="Hours of training, after which the best is written.", metavar="H", rich_help_panel=_ENDING),
]
Patience = Annotated[
    int | None,
    typer.Option(help="End after so many epochs without a better score.", metavar="N", min=1, rich_help_panel=_ENDING),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--lr", help="Highest learning rate of AdamW; default: the method's.", metavar="X", rich_help_panel=_LEARNING
    ),
]
Precision = Annotated[
    str,
    typer.Option(help="fp32, or bf16 for faster products.", metavar="TYPE", rich_help_panel=_LEARNING),
]
Accumulate = Annotated[int, typer.Option(help="Batches for one step.", metavar="N", min=1, rich_help_panel=_LEARNING)]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything that is drawn.", rich_help_panel=_LEARNING)]
SaveEvery = Annotated[
    float, typer.Option(help="Minutes between states from which a stopped run goes on.", metavar="MINUTES")
]
History = Annotated[
    Path | None,
    typer.Option(
        help="A row for each epoch; default: beside -o, its name with .history.csv.", metavar="FILE.csv|.json"
    ),
]
TensorBoardFolder = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard", help="A folder for curves that TensorBoard shows: losses, rate and scores.", metavar="DIR"
    ),
]
Report = Annotated[
    Path | None, typer.Option(help="Write a report, by its suffix JSON or Markdown.", metavar="FILE.json|.md")
]
Device = Annotated[
    str, typer.Option(help="Where to train: auto, cpu, cuda or cuda:N; batches are taken there.", metavar="DEVICE")
]


def finetune(
    task_file: TaskFile,
    model: Model = Path(),
    out: Out = None,
    method_name: MethodName = "finetune",
    plan_file: PlanFile = None,
    format_name: FormatName = None,
    rank: Rank = None,
    keep: Keep = None,
    tolerance: Tolerance = None,
    include: Include = None,
    exclude: Exclude = None,
    dtype: DTypeName = None,
    lr: Rate = None,
    precision: Precision = "fp32",
    accumulate: Accumulate = 1,
    seed: SeedOption = 0,
    teacher: Teacher = None,
    alpha: Alpha = None,
    temperature: Temperature = None,
    kl_direction: Direction = None,
    init: Init = None,
    epochs: Epochs = None,
    steps: Steps = None,
    max_hours: MaxHours = None,
    patience: Patience = None,
    against: Against = None,
    strip_prefix: StripPrefix = "",
    history: History = None,
    tensorboard: TensorBoardFolder = None,
    report: Report = None,
    save_every: SaveEvery = 10.0,
    key: Key = None,
    device: Device = "auto",
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Win the accuracy back: train the factors of a compressed checkpoint on your data, and write it again.

    Methods that compress while they train start from the dense checkpoint, with --plan or --format as in `compress`.
    This runs the code in the task file, and that of whatever it imports. A run that was stopped or killed goes on where
    it was when the same command is given again. Several GPUs: accelerate launch -m tcompress finetune ...

    Example: tcompress finetune small.safetensors --task task.py -o tuned.safetensors
    """
    from tcompress.training.options import TrainingOptions, require_accelerate

    require_accelerate()

    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.choices import plan_asked_for
    from tcompress.cli.console import show, training_bar
    from tcompress.cli.names import default_output
    from tcompress.report.tuning import tuning_document, tuning_view, write_tuning
    from tcompress.report.writing import REPORT_SUFFIXES, check_path
    from tcompress.training.curves import check_tensorboard
    from tcompress.training.history import check_history
    from tcompress.training.methods import make_method
    from tcompress.training.tuning import finetune as tune
    from tcompress.training.tuning import needs_of, uses_of
    from tcompress.workflow.settings import Settings
    from tcompress.workflow.task import load_task

    method = make_method(method_name, alpha=alpha, temperature=temperature, kl_direction=kl_direction, init=init)
    chosen = None if device == "auto" else pick_device(device)
    plan = plan_asked_for(
        plan_file, format_name, include, exclude, False, rank=rank, keep=keep, tolerance=tolerance, seed=seed
    )
    options = TrainingOptions(epochs, steps, lr, seed, max_hours, patience, precision, accumulate, save_every, chosen)
    dense = _dense(against, teacher, has_teacher=method.has_teacher)
    out = out or default_output(model, "tuned")
    history = history or out.with_name(f"{out.name}.history.csv")
    set_threads(threads)
    check_path(report, REPORT_SUFFIXES)
    check_history(history)
    check_tensorboard(tensorboard)
    task = load_task(task_file, needs_of(method), uses_of(method))
    with open_checkpoint(model, key=key if method.starts_dense else None) as checkpoint, training_bar() as watch:
        plan = plan or method.own_plan(checkpoint, include or (), exclude or ())
        original = None if dense is None else open_checkpoint(dense, key=key)
        result = tune(
            checkpoint,
            task,
            method,
            out=out,
            plan=plan,
            settings=Settings(pick_dtype(dtype), pick_device(device)),
            against=original,
            options=options,
            strip_prefix=strip_prefix,
            history=history,
            tensorboard=tensorboard,
            force=force,
            watch=watch,
        )
    document = tuning_document(result)
    if result.is_main:
        if report is not None:
            write_tuning(report, document)
        show(document, tuning_view(document), as_json=as_json)
    _require_finished(result)


def _dense(against: Path | None, teacher: Path | None, *, has_teacher: bool) -> Path | None:
    """Return the dense checkpoint, under whichever name it was given."""
    from tcompress.training.methods import METHODS

    if teacher is not None and not has_teacher:
        taught = " or ".join(name for name, method in METHODS.items() if method.has_teacher)
        way_out = "--against gives the dense checkpoint to compare with"
        raise UsageError(f"--teacher goes with --method {taught}; {way_out}")
    if teacher is not None and against is not None and teacher != against:
        raise UsageError("--teacher and --against are two checkpoints; the dense one is both")
    return teacher or against


def _require_finished(result: TuningResult) -> None:
    """Raise NumericalError where training ended before its time; what was best by then is written."""
    if result.problem is not None:
        raise NumericalError(
            f"{result.problem}; epoch {result.best_epoch} was the best and is written", path=result.task
        )
