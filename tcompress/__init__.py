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
    from tcompress.runtime.install import collect
    from tcompress.training.methods import make_method
    from tcompress.training.options import TrainingOptions
    from tcompress.training.tuning import finetune
    from tcompress.workflow.analysis import analyze
    from tcompress.workflow.budgeting import make_plan
    from tcompress.workflow.calibration import calibrate
    from tcompress.workflow.compression import compress, dry_run
    from tcompress.workflow.decompression import decompress
    from tcompress.workflow.evaluation import evaluate
    from tcompress.workflow.exporting import export_onnx
    from tcompress.workflow.inspection import inspect
    from tcompress.workflow.loading import load_into, load_state_dict
    from tcompress.workflow.plan import Plan, Target, plan_for, read_plan
    from tcompress.workflow.reconstruction import Reconstruction
    from tcompress.workflow.saving import save_compressed
    from tcompress.workflow.settings import Settings
    from tcompress.workflow.task import load_task
    from tcompress.workflow.verification import verify

__all__ = [
    "FORMATS",
    "Plan",
    "Reconstruction",
    "Settings",
    "Target",
    "TrainingOptions",
    "__version__",
    "analyze",
    "calibrate",
    "collect",
    "compress",
    "decompress",
    "dry_run",
    "evaluate",
    "export_onnx",
    "finetune",
    "inspect",
    "load_into",
    "load_state_dict",
    "load_task",
    "make_method",
    "make_plan",
    "open_checkpoint",
    "plan_for",
    "read_plan",
    "save_compressed",
    "verify",
]

_HOME = {
    "FORMATS": "tcompress.formats",
    "Plan": "tcompress.workflow.plan",
    "Reconstruction": "tcompress.workflow.reconstruction",
    "Settings": "tcompress.workflow.settings",
    "Target": "tcompress.workflow.plan",
    "TrainingOptions": "tcompress.training.options",
    "analyze": "tcompress.workflow.analysis",
    "calibrate": "tcompress.workflow.calibration",
    "collect": "tcompress.runtime.install",
    "compress": "tcompress.workflow.compression",
    "decompress": "tcompress.workflow.decompression",
    "dry_run": "tcompress.workflow.compression",
    "evaluate": "tcompress.workflow.evaluation",
    "export_onnx": "tcompress.workflow.exporting",
    "finetune": "tcompress.training.tuning",
    "inspect": "tcompress.workflow.inspection",
    "load_into": "tcompress.workflow.loading",
    "load_state_dict": "tcompress.workflow.loading",
    "load_task": "tcompress.workflow.task",
    "make_method": "tcompress.training.methods",
    "make_plan": "tcompress.workflow.budgeting",
    "open_checkpoint": "tcompress.checkpoint.opening",
    "plan_for": "tcompress.workflow.plan",
    "read_plan": "tcompress.workflow.plan",
    "save_compressed": "tcompress.workflow.saving",
    "verify": "tcompress.workflow.verification",
}


def __getattr__(name: str) -> object:
    """Return a public name from where it lives (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'tcompress' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
