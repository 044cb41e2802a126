"""Published checkpoints, where they are at hand: every format, there and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats import FORMATS, make
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.verification import verify
from tests.conftest import ROOT

MODELS = ROOT.parent / "shared" / "data" / "models"
PUBLISHED = sorted([*MODELS.glob("*.safetensors"), *MODELS.glob("*.th")])

pytestmark = pytest.mark.skipif(not PUBLISHED, reason="the published models are not here")
every_model = pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: Path(path).name)


def there_and_back(path, choice, tmp_path):
    model, plan = open_checkpoint(path), plan_for(choice)
    small, dense = tmp_path / "small.safetensors", tmp_path / f"dense{path.suffix}"
    planned, result = dry_run(model, plan), compress(model, plan, out=small)
    assert result.stored_bytes == small.stat().st_size <= planned.stored_bytes
    if planned.exact_bytes:
        assert planned.stored_bytes == result.stored_bytes
    assert verify(open_checkpoint(small), against=model).problems == ()
    decompress(open_checkpoint(small), out=dense)
    back = open_checkpoint(dense)
    assert {name: (info.shape, info.dtype) for name, info in back.items()} == {
        name: (info.shape, info.dtype) for name, info in model.items()
    }
    return result


@pytest.mark.parametrize("format_type", FORMATS.values(), ids=FORMATS.keys())
@every_model
def test_half_of_the_bytes_there_and_back(path, format_type, tmp_path):
    result = there_and_back(path, Target(format_type, keep=0.5), tmp_path)
    if format_type.name != "joint":  # groups that are better apart stay dense
        assert result.compression_ratio > 1.7
    if format_type.exact_bytes:  # else the bytes are a bound, which fits are below
        assert result.compression_ratio < 2.2


@pytest.mark.parametrize("format_type", [f for f in FORMATS.values() if f.rank_option], ids=lambda f: f.name)
@every_model
def test_rank_eight_there_and_back(path, format_type, tmp_path):
    there_and_back(path, make(format_type, {format_type.rank_option: 8}), tmp_path)
