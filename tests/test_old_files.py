"""Files that earlier versions wrote: every one stays readable, and means what it meant."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats import FORMATS
from tcompress.workflow.decompression import decompress
from tcompress.workflow.verification import verify
from tests.conftest import FIXTURES

OLD_FILES = sorted((FIXTURES / "compressed").rglob("*.safetensors"))


@pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_old_file_is_sound_and_close_to_its_original(path, tmp_path):
    original = FIXTURES / "digits_cnn.safetensors"
    result = verify(open_checkpoint(path), against=open_checkpoint(original))
    assert result.problems == ()
    assert result.layers
    decompress(open_checkpoint(path), out=tmp_path / "dense.safetensors")
    before, after = load_file(original), load_file(tmp_path / "dense.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}


def test_every_format_has_an_old_file():
    assert {path.stem for path in (FIXTURES / "compressed" / "v1").iterdir()} >= set(FORMATS)
