"""decompress: names, shapes, types, ties and layout come back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, UsageError
from tcompress.formats.svd import SVD
from tcompress.workflow.compression import compress
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import plan_for


def there_and_back(model, small, dense):
    compress(open_checkpoint(model), plan_for(SVD(rank=20)), out=small)
    decompress(open_checkpoint(small), out=dense)


def test_a_file_comes_back_with_its_tensors_and_metadata(model_file, tmp_path):
    there_and_back(model_file, tmp_path / "s.safetensors", tmp_path / "d.safetensors")
    before, after = load_file(model_file), load_file(tmp_path / "d.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tied_tensors_are_stored_once_and_come_back_tied(fixtures, tmp_path):
    there_and_back(fixtures / "digits_mlp_tied.pt", tmp_path / "s.safetensors", tmp_path / "d.pt")
    names = set(open_checkpoint(tmp_path / "s.safetensors"))
    assert "hidden1.weight.left" in names
    assert not any(name.startswith("hidden2.") for name in names)
    before = torch.load(fixtures / "digits_mlp_tied.pt", weights_only=True)
    after = torch.load(tmp_path / "d.pt", weights_only=True)
    assert set(after) == set(before)
    assert after["hidden1.weight"].data_ptr() == after["hidden2.weight"].data_ptr()


def test_tied_tensors_come_back_under_both_names_in_safetensors(fixtures, tmp_path):
    there_and_back(fixtures / "digits_mlp_tied.pt", tmp_path / "s.safetensors", tmp_path / "d.safetensors")
    after = load_file(tmp_path / "d.safetensors")
    assert torch.equal(after["hidden1.weight"], after["hidden2.weight"])


def test_a_nested_checkpoint_comes_back_nested(fixtures, tmp_path):
    there_and_back(fixtures / "digits_cnn.pt", tmp_path / "s.safetensors", tmp_path / "d.pth")
    before = torch.load(fixtures / "digits_cnn.pt", weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "d.pth", weights_only=True)["state_dict"]
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}


def test_a_folder_of_shards_comes_back_as_one(fixtures, tmp_path):
    source = fixtures / "digits_mlp_sharded"
    there_and_back(source, tmp_path / "small", tmp_path / "dense")
    assert b"quantization_config" in (tmp_path / "small" / "config.json").read_bytes()
    assert (tmp_path / "dense" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (tmp_path / "small" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "dense" / "model.safetensors.index.json").read_text())
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "dense")
    assert set(index["weight_map"]) == set(before) == set(after)
    assert sorted(path.name for path in (tmp_path / "dense").iterdir()) == sorted(
        path.name for path in source.iterdir()
    )
    assert {name: (i.shape, i.dtype) for name, i in before.items()} == {
        name: (i.shape, i.dtype) for name, i in after.items()
    }


def test_an_unknown_suffix_is_refused_before_anything_is_written(model_file, tmp_path):
    compress(open_checkpoint(model_file), plan_for(SVD(rank=2)), out=tmp_path / "s.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"d.gguf: the output's suffix must be one of .safetensors, .bin, .ckpt"):
        decompress(open_checkpoint(tmp_path / "s.safetensors"), out=tmp_path / "d.gguf")
    assert sorted(tmp_path.iterdir()) == before


def test_a_dense_checkpoint_is_not_decompressed(model_file, tmp_path):
    with pytest.raises(InputError, match="is not a compressed checkpoint: it has no tcompress manifest"):
        decompress(open_checkpoint(model_file), out=tmp_path / "d.safetensors")


def flipped(path, position):
    """Change one byte of a file's data; position: from its end if negative, from the end of its header if not."""
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[position if position < 0 else header + position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("out", ["d.safetensors", "d.pt"])
def test_a_byte_that_changed_is_told_and_nothing_is_written(model_file, tmp_path, out):
    small = tmp_path / "s.safetensors"
    compress(open_checkpoint(model_file), plan_for(SVD(rank=2)), out=small)
    flipped(small, -1)
    before = sorted(tmp_path.iterdir())
    with open_checkpoint(small) as checkpoint:
        *_, last = checkpoint
        with pytest.raises(InputError) as told:
            decompress(checkpoint, out=tmp_path / out)
    assert str(told.value) == f"{small}: tensor {last}: its data was changed after it was written"
    assert sorted(tmp_path.iterdir()) == before


def test_a_byte_that_changed_in_one_shard_is_told(fixtures, tmp_path):
    with open_checkpoint(fixtures / "digits_mlp_sharded") as checkpoint:
        compress(checkpoint, plan_for(SVD(rank=2)), out=tmp_path / "small", max_shard_bytes=2000)
    shard = max((tmp_path / "small").glob("*.safetensors"))
    flipped(shard, 0)
    with pytest.raises(InputError, match=rf"{shard.name}: tensor \S+: its data was changed after it was written"):
        decompress(open_checkpoint(tmp_path / "small"), out=tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_hashes_that_were_cut_short_are_told(model_file, tmp_path):
    small = tmp_path / "s.safetensors"
    compress(open_checkpoint(model_file), plan_for(SVD(rank=2)), out=small)
    content = small.read_bytes()
    start = content.index(b'\\"tensors\\":\\"') + len(b'\\"tensors\\":\\"')
    end = content.index(b'\\"', start)
    length = int.from_bytes(content[:8], "little")
    shorter = content[8:start] + content[start + 24 : end] + content[end : 8 + length] + b" " * 24  # JSON may end so
    small.write_bytes(content[:8] + shorter + content[8 + length :])
    with pytest.raises(InputError, match="its header was changed after it was written"):
        decompress(open_checkpoint(small), out=tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()
