"""tcompress verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tcompress.cli.options import Device, Json, Key, MaxMemory, Model, Threads, parse_size, pick_device, set_threads
from tcompress.errors import VerifyError

Against = Annotated[
    Path | None, typer.Option(help="The checkpoint it was made from: measure every error again.", metavar="MODEL")
]


def verify(
    model: Model = Path(),
    against: Against = None,
    key: Key = None,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    as_json: Json = False,
) -> None:
    """Check a compressed checkpoint: every byte, the manifest, and the errors that it reports.

    Example: tcompress verify small.safetensors --against model.safetensors
    """
    from tcompress.checkpoint.memory import limited
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import progress_bar, show
    from tcompress.report.documents import verification_document
    from tcompress.report.tables import verification_view
    from tcompress.workflow import verification

    chosen = pick_device(device)
    set_threads(threads)
    memory = parse_size(max_memory, "--max-memory")
    with limited(memory), open_checkpoint(model) as checkpoint, progress_bar() as progress:
        original = None if against is None else open_checkpoint(against, key=key)
        result = verification.verify(checkpoint, against=original, device=chosen, progress=progress)
    document = verification_document(result)
    show(document, verification_view(document), as_json=as_json)
    if result.problems:
        raise VerifyError(f"{len(result.problems)} difference(s) found", path=model)
