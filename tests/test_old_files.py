"""Files that earlier versions wrote: every one stays readable, and means what it meant."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats import FORMATS
from tcompress.formats.sparse import Sparse
from tcompress.workflow.compression import compress
from tcompress.workflow.decoding import view
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import plan_for
from tcompress.workflow.verification import verify
from tests.conftest import FIXTURES

COMPRESSED = FIXTURES / "compressed"
OLD_FILES = sorted(COMPRESSED.glob("v*/*.safetensors"))
every_file = pytest.mark.parametrize("path", OLD_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")


def original_of(path):
    """What the file was made from: only weights with shared bases have anything to be stored jointly."""
    return COMPRESSED / "shared_bases.safetensors" if "joint" in path.stem else FIXTURES / "digits_cnn.safetensors"


@every_file
def test_an_old_file_is_sound_and_close_to_its_original(path, tmp_path):
    original = original_of(path)
    result = verify(open_checkpoint(path), against=open_checkpoint(original))
    assert result.problems == ()
    assert result.layers
    decompress(open_checkpoint(path), out=tmp_path / "dense.safetensors")
    before, after = load_file(original), load_file(tmp_path / "dense.safetensors")
    assert {name: tensor.shape for name, tensor in before.items()} == {name: t.shape for name, t in after.items()}
    rebuilt = {layer.name: layer.reported_error for layer in result.layers}
    for name, tensor in before.items():
        if name not in rebuilt:
            assert torch.equal(after[name], tensor), name
            continue
        lost = float(torch.linalg.vector_norm(tensor.double() - after[name].double()))
        assert math.isclose(lost, rebuilt[name] * float(torch.linalg.vector_norm(tensor.double())), rel_tol=1e-4), name
        assert rebuilt[name] < 0.95, name


@every_file
def test_an_old_file_holds_the_format_that_it_is_named_after(path):
    with open_checkpoint(path) as checkpoint:
        layers = view(checkpoint).manifest.layers
        settings = [view(checkpoint).setting(name) for name in layers]
        factors = [factor for entry in layers.values() for factor in entry.factors.values()]
    held = {factor.values for factor in factors} | {factor.encoding.partition(":")[0] for factor in factors}
    name = max((name for name in FORMATS if path.stem.startswith(name)), key=len)
    variant = path.stem.removeprefix(name).removeprefix("-")
    assert len(settings) > 1
    assert {setting.name for setting in settings} == {name}
    assert variant in held or all(variant in str(setting) for setting in settings)


@pytest.mark.parametrize("path", [path for path in OLD_FILES if "csr" in path.stem or "elias" in path.stem], ids=str)
def test_old_files_of_equal_values_in_other_encodings_are_the_same_model(path, tmp_path):
    here = tmp_path / "here.safetensors"
    with open_checkpoint(FIXTURES / "digits_cnn.safetensors") as checkpoint:
        compress(checkpoint, plan_for(Sparse(density=0.1)), out=here)
    for number, each in enumerate((path, here)):
        decompress(open_checkpoint(each), out=tmp_path / f"{number}.safetensors")
    one, other = (load_file(tmp_path / f"{number}.safetensors") for number in range(2))
    rebuilt = view(open_checkpoint(path)).manifest.layers
    assert all(torch.equal(one[name], other[name]) for name in rebuilt)


def test_every_format_has_an_old_file():
    assert {path.stem for path in OLD_FILES if path.parent.name == "v1"} >= set(FORMATS)
