"""tcompress export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcompress.cli.options import Force, Json, Model, Threads, set_threads

Onnx = Annotated[Path, typer.Option("--onnx", help="File to write.", metavar="FILE.onnx")]
TaskFile = Annotated[
    str,
    typer.Option(
        "--task",
        help="Python file with model() and example_inputs(), or an object in it that has them. ITS CODE IS RUN.",
        metavar="TASK.py[:NAME]",
    ),
]
StripPrefix = Annotated[
    str, typer.Option(help="What the checkpoint's names have in front of the model's, as module.", metavar="P")
]


def export(
    onnx: Onnx,
    task_file: TaskFile,
    model: Model = Path(),
    strip_prefix: StripPrefix = "",
    threads: Threads = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a compressed model as ONNX that computes with the factors, checked against torch with ONNX Runtime.

    This runs the code in the task file, and that of whatever it imports: give it files that you would run yourself.
    A task file has two functions, model() -> torch.nn.Module and example_inputs() -> a tensor, tuple or dict of tensors
    with the batch size first. Needs the packages of the extra named onnx.

    Example: tcompress export small.safetensors --onnx small.onnx --task task.py
    """
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import show
    from tcompress.report.exporting import export_document, export_view
    from tcompress.workflow import exporting
    from tcompress.workflow.onnx_file import require_packages
    from tcompress.workflow.task import load_task

    require_packages()
    set_threads(threads)
    task = load_task(task_file, exporting.NEEDS, exporting.USES)
    with open_checkpoint(model) as checkpoint:
        result = exporting.export_onnx(checkpoint, task, out=onnx, strip_prefix=strip_prefix, force=force)
    document = export_document(result)
    show(document, export_view(document), as_json=as_json)
