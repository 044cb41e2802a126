"""Published checkpoints, where they are at hand: every format, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats import FORMATS
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.verification import verify
from tests.conftest import ROOT

MODELS = ROOT.parent / "shared" / "data" / "models"
PUBLISHED = sorted([*MODELS.glob("*.safetensors"), *MODELS.glob("*.th")])

pytestmark = pytest.mark.skipif(not PUBLISHED, reason="the published models are not here")


@pytest.mark.parametrize("format_type", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: Path(path).name)
def test_a_published_model_goes_there_and_back(path, format_type, tmp_path):
    model, plan = open_checkpoint(path), plan_for(Target(format_type, keep=0.5))
    small, dense = tmp_path / "small.safetensors", tmp_path / f"dense{path.suffix}"
    result = compress(model, plan, out=small)
    assert result.stored_bytes == small.stat().st_size == dry_run(model, plan).stored_bytes
    assert 1.7 < result.compression_ratio < 2.2
    assert verify(open_checkpoint(small), against=model).problems == ()
    decompress(open_checkpoint(small), out=dense)
    back = open_checkpoint(dense)
    assert {name: (info.shape, info.dtype) for name, info in back.items()} == {
        name: (info.shape, info.dtype) for name, info in model.items()
    }
