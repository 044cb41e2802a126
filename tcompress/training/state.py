"""Where a training run is, in one file beside its output that is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tcompress.checkpoint.output import STATE
from tcompress.errors import OutputError


class SavedState:
    """The state of one run. run: what makes two runs the same, as JSON; the state of another run is not taken.

    restarted: whether there was one.
    """

    def __init__(self, workspace: Path, run: Mapping[str, Any]) -> None:
        self.path = workspace / STATE
        self._run = json.dumps(run, sort_keys=True)
        for draft in workspace.glob(f".{STATE}.*.tmp"):  # of a run that was killed while it wrote
            draft.unlink(missing_ok=True)
        self.restarted = False

    def exists(self) -> bool:
        """Tell whether a run could go on from here."""
        return self.path.exists()

    def read(self) -> dict[str, Any] | None:
        """Return what was written last; None where there is nothing, or nothing of this run."""
        if not self.path.exists():
            return None
        found: Any = None
        with contextlib.suppress(OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError):
            found = torch.load(self.path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict) or found.pop("run", None) != self._run:
            self.restarted = True
            return None
        return found

    def write(self, content: Mapping[str, Any]) -> None:
        """Put a state in the place of the last one. Raises OutputError when it cannot be written."""
        write_whole(self.path, lambda file: torch.save({"run": self._run, **content}, file))


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file that has its name when it is complete, and not before. Raises OutputError when it cannot be."""
    draft = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with draft.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer makes the latter of a full disk
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OutputError(f"cannot be written ({reason})", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def random_state() -> dict[str, Any]:
    """Return where all generators of this process are, in tensors and plain values."""
    numpy_state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put all generators where they were."""
    kind, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
