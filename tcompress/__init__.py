"""tcompress makes released neural networks smaller without their training code.

The public names are resolved on first use: `tcompress --help` must not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tcompress.version import __version__

if TYPE_CHECKING:
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.formats import FORMATS
    from tcompress.workflow.analysis import analyze
    from tcompress.workflow.compression import compress, dry_run
    from tcompress.workflow.decompression import decompress
    from tcompress.workflow.inspection import inspect
    from tcompress.workflow.plan import Plan, Target, plan_for, read_plan
    from tcompress.workflow.settings import Settings
    from tcompress.workflow.verification import verify

__all__ = [
    "FORMATS",
    "Plan",
    "Settings",
    "Target",
    "__version__",
    "analyze",
    "compress",
    "decompress",
    "dry_run",
    "inspect",
    "open_checkpoint",
    "plan_for",
    "read_plan",
    "verify",
]

_HOME = {
    "FORMATS": "tcompress.formats",
    "Plan": "tcompress.workflow.plan",
    "Settings": "tcompress.workflow.planning",
    "Target": "tcompress.workflow.plan",
    "analyze": "tcompress.workflow.analysis",
    "compress": "tcompress.workflow.compression",
    "decompress": "tcompress.workflow.decompression",
    "dry_run": "tcompress.workflow.compression",
    "inspect": "tcompress.workflow.inspection",
    "open_checkpoint": "tcompress.checkpoint.opening",
    "plan_for": "tcompress.workflow.plan",
    "read_plan": "tcompress.workflow.plan",
    "verify": "tcompress.workflow.verification",
}


def __getattr__(name: str) -> object:
    """Return a public name from where it lives (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'tcompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
