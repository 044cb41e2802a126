"""What commands that work for long begin with: limits are set, the checkpoint is open, and somebody may be watching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcompress.checkpoint.memory import limited
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import Checkpoint
from tcompress.cli.console import progress_bar
from tcompress.cli.options import parse_size, set_threads
from tcompress.workflow.progress import Progress


@contextmanager
def opened(
    model: Path, *, key: str | None, threads: int | None, max_memory: str | None
) -> Iterator[tuple[Checkpoint, Progress]]:
    """Open the checkpoint of a command, with its --key, --threads and --max-memory; the second shows progress."""
    set_threads(threads)
    memory = parse_size(max_memory, "--max-memory")
    with limited(memory), open_checkpoint(model, key=key) as checkpoint, progress_bar() as progress:
        yield checkpoint, progress
