"""What tests of training have in common: a task file, a compressed checkpoint, and one call that trains it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tcompress as package
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats import Format
from tcompress.training.objective import Method
from tcompress.training.tuning import finetune, needs_of, uses_of
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.settings import Settings
from tests.training.tasks import MLP


@pytest.fixture
def small(fixtures, tmp_path) -> Callable[..., Path]:
    """Compress a fixture by a setting."""

    def compressed(setting, store=None, source="digits_mlp.safetensors", plan=None) -> Path:
        out = tmp_path / ("small" if (fixtures / source).is_dir() else "small.safetensors")
        plan = plan or package.plan_for(setting)
        package.compress(open_checkpoint(fixtures / source), plan, out=out, settings=Settings(store=store), force=True)
        return out

    return compressed


@pytest.fixture
def tune(tmp_path):
    """Train on the CPU with a task of this text."""

    def call(checkpoint: Path, method=None, *, text: str = MLP, out: str = "tuned.safetensors", against=None, **rest):
        (tmp_path / "task.py").write_text(text)
        method = method or package.make_method("finetune")
        named = {
            name: rest.pop(name)
            for name in ("history", "tensorboard", "force", "strip_prefix", "watch", "plan", "settings")
            if name in rest
        }
        task = package.load_task(str(tmp_path / "task.py"), needs_of(method), uses_of(method))
        options = package.TrainingOptions(device=torch.device("cpu"), **{"epochs": 2, **rest})
        dense = None if against is None else open_checkpoint(against)
        return finetune(
            open_checkpoint(checkpoint), task, method, out=tmp_path / out, against=dense, options=options, **named
        )

    return call


@pytest.fixture
def from_dense(tune, fixtures):
    """Return what runs one method from a dense fixture, with a setting or a plan."""

    def runner(method_type: type[Method], **defaults):
        def call(plan, method=None, *, source="digits_mlp.safetensors", store=None, **rest):
            plan = plan_for(plan) if isinstance(plan, Format | Target) else plan
            named = {"plan": plan, "settings": Settings(store=store), **defaults, **rest}
            return tune(fixtures / source, method or method_type(), **named)  # an absolute source stays as it is

        return call

    return runner
