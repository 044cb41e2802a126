"""What several test files need: the fixtures' paths, a way to run the command line, small random checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tcompress.cli.app import run

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "fixtures"


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On small matrices a second thread only waits, and where another process has its core, for long."""
    torch.set_num_threads(1)


@pytest.fixture
def fixtures() -> Path:
    return FIXTURES


@pytest.fixture
def tcompress(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Answer]:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tcompress"])

    def call(*arguments: object) -> Answer:
        code = run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Answer(code, captured.out, captured.err)

    return call


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    """A small checkpoint with a layer of each kind, of low rank plus noise."""
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        fan_in = math.prod(shape[1:])
        low = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, fan_in, generator=generator)
        return (low + 0.1 * torch.randn(low.shape, generator=generator)).reshape(shape).to(dtype)

    tensors = {
        "embed_tokens.weight": weight(96, 32),
        "conv.weight": weight(32, 16, 3, 3),
        "conv.bias": torch.zeros(32),
        "depthwise.weight": weight(64, 1, 3, 3),
        "fc.weight": weight(64, 80),
        "half.weight": weight(64, 80, dtype=torch.bfloat16),
        "steps": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path
