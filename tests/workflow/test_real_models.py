"""Published checkpoints, where they are at hand: every format, there and back."""

from __future__ import annotations

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
BY_SIZE = sorted(PUBLISHED, key=lambda path: path.stat().st_size)
# Their fits go on for seconds a layer: by default on the smallest models alone.
SEARCHED = {"cp", "joint", "reshaped-sum", "sparse-product"}


def everywhere(formats, smallest):
    """Yield every model with every format; -m slow has the searched ones of all but the smallest models."""
    for path in PUBLISHED:
        for kind in formats:
            is_slow = kind.name in SEARCHED and path not in BY_SIZE[:smallest]
            marks = [pytest.mark.slow] if is_slow else []
            yield pytest.param(path, kind, marks=marks, id=f"{path.name}-{kind.name}")


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


@pytest.mark.parametrize(("path", "format_type"), list(everywhere(FORMATS.values(), smallest=1)))
def test_half_of_the_bytes_there_and_back(path, format_type, tmp_path):
    result = there_and_back(path, Target(format_type, keep=0.5), tmp_path)
    if format_type.name != "joint":  # groups that are better apart stay dense
        assert result.compression_ratio > 1.7
    if format_type.exact_bytes:  # else the bytes are a bound, which fits are below
        assert result.compression_ratio < 2.2


@pytest.mark.parametrize(
    ("path", "format_type"), list(everywhere([f for f in FORMATS.values() if f.rank_option], smallest=2))
)
def test_rank_eight_there_and_back(path, format_type, tmp_path):
    there_and_back(path, make(format_type, {format_type.rank_option: 8}), tmp_path)
