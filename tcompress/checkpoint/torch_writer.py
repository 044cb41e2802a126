"""Writes a torch checkpoint from a finished safetensors file: its tensors stay mapped, ties share one storage."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tcompress.checkpoint.reader import Checkpoint


def write_torch(
    path: Path, staged: Checkpoint, *, names: Iterable[str], tied: Mapping[str, str], key: str | None
) -> None:
    """Save the tensors of ``staged`` as a state dict, under the dotted ``key`` of a nested checkpoint if given.

    names: of all tensors, in order. tied: second name -> first name, which alone is in ``staged``.
    """
    tensors = {name: staged.read(name) for name in staged}  # mapped, not read
    state: Any = OrderedDict((name, tensors[tied.get(name, name)]) for name in names)
    for part in reversed(key.split(".") if key else []):
        state = {part: state}
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
