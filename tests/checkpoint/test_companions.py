"""What travels with the weights: everything that is no weight, is not hidden and lies at home."""

from __future__ import annotations

import os

import pytest

from tcompress.checkpoint.companions import MAX_DEPTH, copy_companions
from tcompress.errors import InputError


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    return folder


def put(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_configuration_tokenizer_and_subfolders_are_copied(source, target):
    names = [
        "README.md",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "modeling_own.py",
        "scheduler/scheduler_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer/deep/vocab.txt",
    ]
    put(source, *names)
    assert copy_companions(source, target, without=[]) == []
    assert tree(target) == names
    assert (target / "tokenizer/deep/vocab.txt").read_text() == "tokenizer/deep/vocab.txt"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "consolidated.00.pth",
        "weights.pt",
        "a.th",
        "last.ckpt",
        "model.pkl",
        "model.pickle",
        "model.joblib",
        "arrays.npz",
        "array.npy",
        "tf_model.h5",
        "model.keras",
        "flax_model.msgpack",
        "rust_model.ot",
        "saved_model.pb",
        "model.tflite",
        "model.onnx",
        "model.onnx_data",
        "model.Q4_K_M.gguf",
        "model.ggml",
        "model.mlmodel",
        "training_args.bin",
        "tcompress.json",
        "MODEL.BIN",
        "sub/deep/model.safetensors",
    ],
)
def test_weights_of_all_kinds_are_left_out_and_named(source, target, name):
    put(source, name, "config.json")
    assert copy_companions(source, target, without=[]) == [name]
    assert tree(target) == ["config.json"]


def test_indices_are_left_out_silently_and_so_are_hidden_files_and_folders(source, target):
    put(source, "model.safetensors.index.json", ".gitattributes", ".cache/config.json", ".git/HEAD", "config.json")
    assert copy_companions(source, target, without=[]) == []
    assert tree(target) == ["config.json"]


def test_the_checkpoints_own_files_are_left_out_silently(source, target):
    put(source, "model.safetensors", "a.unknown", "config.json")
    without = [source / "model.safetensors", source / "a.unknown"]
    assert copy_companions(source, target, without=without) == []
    assert tree(target) == ["config.json"]


def test_the_output_inside_the_folder_and_earlier_compressed_copies_are_skipped(source, target):
    put(source, "config.json", "small/config.json", "small/model.tcompress.safetensors", "out/config.json")
    put(source, "sharded/config.json", "sharded/model.tcompress-00001-of-00002.safetensors", "plain/config.json")
    assert copy_companions(source, target, without=[source / "out"]) == []
    assert tree(target) == ["config.json", "plain/config.json"]


def test_links_that_lead_outside_are_left_out(source, target, tmp_path):
    put(tmp_path, "secret.txt", "secrets/key.txt")
    (source / "stolen.txt").symlink_to(tmp_path / "secret.txt")
    (source / "relative.txt").symlink_to("../secret.txt")
    (source / "system.txt").symlink_to("/etc/passwd")
    (source / "folder").symlink_to(tmp_path / "secrets")
    put(source, "config.json")
    assert copy_companions(source, target, without=[]) == ["relative.txt", "stolen.txt", "system.txt"]
    assert tree(target) == ["config.json"]


def test_links_inside_the_folder_are_followed(source, target):
    put(source, "sub/real.json")
    (source / "link.json").symlink_to("sub/real.json")
    assert copy_companions(source, target, without=[]) == []
    assert (target / "link.json").read_text() == "sub/real.json"
    assert not (target / "link.json").is_symlink()


def test_links_that_lead_nowhere_or_in_circles_and_special_files_are_skipped(source, target):
    (source / "nowhere.json").symlink_to("missing")
    (source / "circle.json").symlink_to("circle.json")
    (source / "ring").symlink_to(".")
    os.mkfifo(source / "pipe.json")
    put(source, "config.json")
    assert copy_companions(source, target, without=[]) == []
    assert tree(target) == ["config.json"]


@pytest.mark.parametrize("subfolder", ["", "unet"])
def test_links_into_the_blobs_of_a_download_cache_are_followed(tmp_path, target, subfolder):
    cache = tmp_path / "models--a--b"
    source = cache / "snapshots" / "0123" / subfolder
    put(cache, "blobs/config", "blobs/deep", "blobs/weights")
    (source / "deep").mkdir(parents=True)
    (source / "config.json").symlink_to(cache / "blobs" / "config")
    (source / "deep" / "a.json").symlink_to(os.path.relpath(cache / "blobs" / "deep", source / "deep"))
    (source / "model.safetensors").symlink_to(cache / "blobs" / "weights")
    assert copy_companions(source, target, without=[source / "model.safetensors"]) == []
    assert {name: (target / name).read_text() for name in tree(target)} == {
        "config.json": "blobs/config",
        "deep/a.json": "blobs/deep",
    }


def test_of_a_download_cache_only_the_models_own_blobs_are_at_home(tmp_path, target):
    source = tmp_path / "models--a--b" / "snapshots" / "0123"
    source.mkdir(parents=True)
    put(tmp_path, "models--c--d/blobs/x", "models--a--b/refs/main", "secrets/blob")
    (tmp_path / "models--a--b" / "blobs").symlink_to(tmp_path / "secrets")
    (source / "other.json").symlink_to("../../../models--c--d/blobs/x")
    (source / "refs.json").symlink_to("../../refs/main")
    (source / "secret.json").symlink_to("../../blobs/blob")
    assert copy_companions(source, target, without=[]) == ["other.json", "refs.json", "secret.json"]
    assert tree(target) == []


def test_a_folder_that_is_a_link_itself_is_at_home(source, target, tmp_path):
    put(source, "config.json", "sub/a.json")
    (tmp_path / "link").symlink_to(source)
    assert copy_companions(tmp_path / "link", target, without=[]) == []
    assert tree(target) == ["config.json", "sub/a.json"]


def test_folders_nested_without_end_are_refused(source, target):
    deep = source.joinpath(*["d"] * MAX_DEPTH)
    deep.mkdir(parents=True)
    assert copy_companions(source, target, without=[]) == []
    (deep / "d").mkdir()
    with pytest.raises(InputError) as caught:
        copy_companions(source, target, without=[])
    assert str(caught.value) == f"{source}: holds folders nested deeper than 50"
