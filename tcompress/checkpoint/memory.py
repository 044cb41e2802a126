"""No tensor is built that the machine could not hold, or the user's limit: a few bytes may claim terabytes."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from tcompress.errors import SafetyError

_limit: ContextVar[int | None] = ContextVar("memory limit", default=None)


@contextmanager
def limited(nbytes: int | None) -> Iterator[None]:
    """Refuse within this context what would take more than so many bytes; None leaves it to the machine."""
    token = _limit.set(nbytes)
    try:
        yield
    finally:
        _limit.reset(token)


def available_memory() -> tuple[int, str]:
    """Return how many bytes may be taken, and who says so."""
    limits = [(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine has")]
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if address_space != resource.RLIM_INFINITY:
        limits.append((address_space, "this process may have"))
    asked = _limit.get()
    if asked is not None:
        limits.append((asked, "--max-memory is"))
    return min(limits)


def require_memory(shape: tuple[int, ...], dtype: torch.dtype, *, path: Path, tensor: str, copies: int = 1) -> None:
    """Raise SafetyError when so many copies of a dense tensor of this shape would not fit into memory."""
    needed = math.prod(shape) * max(dtype.itemsize, 4) * copies
    available, whose = available_memory()
    if needed > available:
        work = "" if copies == 1 else ", with what is computed from it"
        raise SafetyError(
            f"claims a dense shape of {shape}, {needed} bytes{work}; {whose} {available}", path=path, tensor=tensor
        )


def require_bytes(nbytes: int, *, path: Path, tensor: str) -> None:
    """Raise SafetyError when so many bytes of a file would not fit into memory."""
    available, whose = available_memory()
    if nbytes > available:
        raise SafetyError(f"has {nbytes} bytes; {whose} {available}", path=path, tensor=tensor)
