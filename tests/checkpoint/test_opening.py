"""Which checkpoint stands behind a path: what a folder holds, best first, and content before suffix."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, TcompressError

# Best first: each is found although all that follow are there too.
ORDER = (
    "model.tcompress.safetensors.index.json",
    "model.tcompress.safetensors",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "other.safetensors.index.json",
    "other.safetensors",
    "other.pt",
)


def put(folder, name):
    """Write a checkpoint whose only tensor is called as the file."""
    if name.endswith(".index.json"):
        shard = f"shard-of-{name.removesuffix('.index.json')}"
        write(folder / shard, name)
        (folder / name).write_text(json.dumps({"weight_map": {name: shard}}))
    else:
        write(folder / name, name)


def write(path, name):
    tensors = {name: torch.ones(2)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def refusal(path):
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("first", range(7))
def test_a_folders_checkpoint_is_the_best_that_is_there(tmp_path, first):
    for name in ORDER[first:]:
        put(tmp_path, name)
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint) == [ORDER[first]]
        assert checkpoint.folder == tmp_path
        assert checkpoint.sharded == ORDER[first].endswith(".index.json")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "a.pth", "a.th", "a.bin", "a.ckpt"])
def test_the_only_checkpoint_of_a_folder_is_found_by_its_suffix(tmp_path, name):
    put(tmp_path, name)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "readme.md").write_text("a model")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint) == [name]
        assert checkpoint.files == (tmp_path / name,)


def test_safetensors_come_before_pickles(tmp_path):
    put(tmp_path, "a.pt")
    put(tmp_path, "z.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint) == ["z.safetensors"]


def test_of_several_checkpoints_none_is_guessed(tmp_path):
    for name in ("b.safetensors", "a.safetensors", "c.pt"):
        put(tmp_path, name)
    problem = "holds several checkpoints, name one of them: a.safetensors, b.safetensors"
    assert refusal(tmp_path) == f"{tmp_path}: {problem}"


def test_of_very_many_checkpoints_eight_are_named(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.pt").touch()
    named = ", ".join(f"{number:02}.pt" for number in range(8))
    assert refusal(tmp_path) == f"{tmp_path}: holds several checkpoints, name one of them: {named} and 4 more"


def test_a_folder_without_checkpoint_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    problem = "holds no checkpoint (.safetensors, .pt, .pth, .th, .bin, .ckpt)"
    assert refusal(tmp_path) == f"{tmp_path}: {problem}"


def test_nothing_there_is_said(tmp_path):
    assert refusal(tmp_path / "x\ny") == f"{tmp_path}/x\\ny: there is no such file or folder"


def test_a_file_is_opened_without_a_folder_of_its_own(tmp_path):
    put(tmp_path, "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert (checkpoint.folder, checkpoint.sharded) == (None, False)


def test_safetensors_under_another_suffix_are_known_by_their_content(tmp_path):
    put(tmp_path, "model.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model.bin")
    with open_checkpoint(tmp_path / "model.bin") as checkpoint:
        assert checkpoint.read("model.safetensors").tolist() == [1, 1]


@pytest.mark.parametrize("content", [b"", b"x", b"PK\3\4", b"\x80\4.", b"{}" * 20])
@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors", "a.unknown", "noname", "a.safetensors.index.json"])
def test_garbage_is_refused_whatever_it_is_called(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TcompressError) as caught:
        open_checkpoint(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a.safetensors.index.json", "noname"])
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name}: is not a regular file")


def test_an_index_that_is_a_link_to_a_device_is_refused(tmp_path):
    index = tmp_path / "a.safetensors.index.json"
    index.symlink_to("/dev/zero")
    assert refusal(tmp_path) == f"{index}: is not a regular file"
