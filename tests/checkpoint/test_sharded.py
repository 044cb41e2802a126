"""Shards behind an index: all of them and nothing else, and never a file outside their folder."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.sharded import MAX_INDEX_BYTES
from tcompress.errors import InputError, TcompressError

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def index(tmp_path):
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, tmp_path / ONE, metadata={"format": "pt"})
    save_file({"c": torch.zeros(4, dtype=torch.int64)}, tmp_path / TWO)
    path = tmp_path / "model.safetensors.index.json"
    write(path, {"a": ONE, "b": ONE, "c": TWO})
    return path


def write(path, weight_map, **others):
    path.write_text(json.dumps({"metadata": {"total_size": 60}, "weight_map": weight_map, **others}))


def refusal(path):
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.usefixtures("index")
def test_all_tensors_are_read_from_their_shards(tmp_path):
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint) == ["a", "b", "c"]
        assert checkpoint.read("a").tolist() == [0, 1, 2]
        assert bytes(checkpoint.raw("c")) == bytes(32)
        assert checkpoint["b"].shape == (2, 2)
        assert checkpoint.files == (tmp_path / ONE, tmp_path / TWO)
        assert [list(shard) for shard in checkpoint.shards] == [["a", "b"], ["c"]]
        assert checkpoint.index_metadata == {"total_size": 60}
        assert checkpoint.metadata == {"format": "pt"}
        assert checkpoint.sharded


def test_torch_shards_are_read(tmp_path):
    torch.save({"a": torch.arange(3.0)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    write(tmp_path / "pytorch_model.bin.index.json", {"a": "pytorch_model-00001-of-00001.bin"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a").tolist() == [0, 1, 2]


def test_shards_that_are_links_into_a_download_cache_are_read(index, tmp_path):
    cache = tmp_path / "blobs"
    cache.mkdir()
    for name in (ONE, TWO):
        (tmp_path / name).rename(cache / f"blob-{name}")
        (tmp_path / name).symlink_to(cache / f"blob-{name}")
    with open_checkpoint(index) as checkpoint:
        assert checkpoint.read("a").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "..",
        ".",
        "",
        ".hidden.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:\\model.safetensors",
        "model.safetensors\n",
        "model\0.safetensors",
        "~root",
        "$HOME",
        "modèle.safetensors",
        "a" * 256,
        7,
        None,
        True,
        ["model.safetensors"],
        {},
    ],
    ids=str,
)
def test_only_plain_file_names_are_shards(index, shard):
    write(index, {"a": ONE, "b\n": shard})
    assert refusal(index) == f"tensor b\\n: names {shard!r} as its shard, which is no plain file name"


@pytest.mark.parametrize("weight_map", [None, [], {}, "x", 3, [["a", ONE]]])
def test_a_weight_map_that_is_none_is_refused(index, weight_map):
    write(index, weight_map)
    assert refusal(index) == "has no weight_map from tensor names to shards"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "has no weight_map from tensor names to shards"),
        ("[]", "its JSON is not an object"),
        ("", "its JSON cannot be read (Expecting value: line 1 column 1 (char 0))"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "its JSON cannot be read (a name stands there twice)"),
    ],
)
def test_an_index_that_is_no_json_object_is_refused(index, content, problem):
    index.write_text(content)
    assert refusal(index) == problem


@pytest.mark.parametrize("content", [b'{"weight_map": ' + b"[" * 200_000, b"\xff{}", b'{"a": 1' + b"0" * 5000 + b"}"])
def test_an_index_that_json_cannot_parse_is_refused(index, content):
    index.write_bytes(content)
    assert refusal(index).startswith("its JSON cannot be read (")


def test_an_index_larger_than_any_model_needs_is_refused_before_it_is_read(index):
    os.truncate(index, MAX_INDEX_BYTES + 1)
    assert refusal(index) == "is larger than 67108864 bytes, too large for an index"


def test_missing_shards_are_named(index, tmp_path):
    (tmp_path / TWO).unlink()
    assert refusal(index) == f"names shards that are not there: {TWO}"


def test_of_very_many_missing_shards_eight_are_named(index):
    write(index, {f"t{number}": f"s{number:03}" for number in range(100)})
    assert refusal(index) == f"names shards that are not there: {', '.join(f's00{n}' for n in range(8))} and 92 more"


def test_a_shard_that_is_a_folder_or_a_fifo_is_not_there(index, tmp_path):
    (tmp_path / "s1").mkdir()
    os.mkfifo(tmp_path / "s2")
    write(index, {"a": "s1", "b": "s2"})
    assert refusal(index) == "names shards that are not there: s1, s2"


def test_an_index_that_names_itself_is_refused(index):
    write(index, {"a": index.name})
    assert refusal(index)


def test_a_tensor_that_is_not_where_the_index_says_is_refused(index):
    write(index, {"a": ONE, "b": TWO, "c": TWO})
    assert refusal(index) == f"tensor b: is not in {TWO}, where the index has it"
    write(index, {"a": ONE, "b": ONE, "c": TWO, "d": TWO})
    assert refusal(index) == f"tensor d: is not in {TWO}, where the index has it"


def test_a_tensor_that_the_index_does_not_name_is_not_dropped(index):
    write(index, {"a": ONE, "c": TWO})
    assert refusal(index) == f"tensor b: lies in {ONE}, but the index does not name it"


def test_a_tensor_in_two_shards_is_refused(index, tmp_path):
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, tmp_path / TWO)
    assert refusal(index) == f"tensor a: lies in {ONE} and again in {TWO}"


def test_a_damaged_shard_is_named_itself(index, tmp_path):
    (tmp_path / TWO).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        open_checkpoint(index)
    assert str(caught.value).startswith(f"{tmp_path / TWO}: is truncated")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from("abcd"), st.sampled_from([ONE, TWO, "x", "model.safetensors.index.json"]) | st.text(max_size=4)
    )
)
def test_any_weight_map_is_read_or_refused(index, weight_map):
    write(index, weight_map)
    message = ""
    try:
        with open_checkpoint(index) as checkpoint:
            assert set(checkpoint) == set(weight_map)
    except TcompressError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1
