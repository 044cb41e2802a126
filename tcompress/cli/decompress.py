"""tcompress decompress."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcompress.cli.options import (
    Device,
    Force,
    Json,
    MaxMemory,
    MaxShardSize,
    Model,
    Threads,
    parse_size,
    pick_device,
    set_threads,
)

Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="File or folder to write; .pt, .pth, .th, .bin and .ckpt make a torch checkpoint, .safetensors the rest. "
        "Default: a name made from MODEL's, in this folder.",
    ),
]


def decompress(
    model: Model = Path(),
    out: Out = None,
    max_shard_size: MaxShardSize = None,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the plain checkpoint back: original names, shapes, types and layout, for any other tool.

    Example: tcompress decompress small.safetensors -o dense.safetensors
    """
    from tcompress.checkpoint.memory import limited
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import progress_bar, show
    from tcompress.cli.names import default_output
    from tcompress.report.documents import decompression_document
    from tcompress.report.tables import decompression_view
    from tcompress.workflow import decompression

    shard_bytes, chosen = parse_size(max_shard_size, "--max-shard-size"), pick_device(device)
    set_threads(threads)
    memory = parse_size(max_memory, "--max-memory")
    with limited(memory), open_checkpoint(model) as checkpoint, progress_bar() as progress:
        result = decompression.decompress(
            checkpoint,
            out=out or default_output(model, "dense"),
            device=chosen,
            force=force,
            max_shard_bytes=shard_bytes,
            progress=progress,
        )
    document = decompression_document(result)
    show(document, decompression_view(document), as_json=as_json)
