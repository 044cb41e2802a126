"""What fixtures/README.md says of the trained checkpoints is true of the files."""

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "fixtures"
ROW = re.compile(r"^\| `(\S+)` \| `(\S+)` \| ([\d.]+) \| (\d+) \| (\d+) \|$", re.MULTILINE)
ROWS = ROW.findall((FOLDER / "README.md").read_text(encoding="utf-8"))
MAX_TOTAL_BYTES = 600_000


@pytest.fixture(scope="module")
def models():
    spec = spec_from_file_location("fixture_models", FOLDER / "models.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_torch(file):
    return torch.load(FOLDER / file, weights_only=True)


def load_shards(folder):
    index = json.loads((FOLDER / folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    shards = {file: load_file(FOLDER / folder / file) for file in set(index["weight_map"].values())}
    return {key: shards[file][key] for key, file in index["weight_map"].items()}


def load_state_dict(file):
    if (FOLDER / file).is_dir():
        return load_shards(file)
    if file.endswith(".safetensors"):
        return load_file(FOLDER / file)
    checkpoint = load_torch(file)
    return checkpoint.get("state_dict", checkpoint)


def files_of(path):
    return sorted(path.iterdir()) if path.is_dir() else [path]


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def test_the_table_lists_every_checkpoint():
    listed = {file for file, *_ in ROWS}
    present = {path.name for path in FOLDER.iterdir() if path.suffix in {".safetensors", ".pt"}}
    folders = {path.parent.name for path in FOLDER.glob("*/*.index.json")}
    assert len(ROWS) == len(listed) == 6
    assert listed == present | folders


@pytest.mark.parametrize(("file", "network", "accuracy", "right", "_bytes"), ROWS)
def test_accuracy_is_the_one_stated(models, file, network, accuracy, right, _bytes):
    score = models.accuracy(load_state_dict(file), network)
    assert f"{score:.4f}" == accuracy
    assert round(score * 360) == int(right)


@pytest.mark.parametrize(("file", "stated_bytes"), [(row[0], row[4]) for row in ROWS])
def test_size_is_the_one_stated(file, stated_bytes):
    assert sum(path.stat().st_size for path in files_of(FOLDER / file)) == int(stated_bytes)


def test_checkpoints_are_small():
    assert sum(path.stat().st_size for row in ROWS for path in files_of(FOLDER / row[0])) < MAX_TOTAL_BYTES


def test_safetensors_metadata_is_one_key():
    for path in [*FOLDER.glob("*.safetensors"), *FOLDER.glob("digits_mlp_sharded/*.safetensors")]:
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}, path.name


def test_cnn_keeps_its_integer_scalars():
    scalars = {key: tensor for key, tensor in load_state_dict("digits_cnn.safetensors").items() if tensor.ndim == 0}
    assert scalars.keys() == {"bn1.num_batches_tracked", "bn2.num_batches_tracked"}
    assert {tensor.dtype for tensor in scalars.values()} == {torch.int64}


def test_nested_checkpoint_is_the_cnn(models):
    checkpoint = load_torch("digits_cnn.pt")
    assert checkpoint.keys() == {"state_dict", "epoch", "accuracy"}
    assert_same_tensors(checkpoint["state_dict"], load_state_dict("digits_cnn.safetensors"))
    assert checkpoint["accuracy"] == models.accuracy(checkpoint["state_dict"], "digits_cnn")


def test_bf16_file_is_the_mlp_cast():
    mlp = load_state_dict("digits_mlp.safetensors")
    assert_same_tensors(
        load_state_dict("digits_mlp_bf16.safetensors"), {key: tensor.bfloat16() for key, tensor in mlp.items()}
    )


def test_shards_hold_the_mlp():
    mlp = load_state_dict("digits_mlp.safetensors")
    assert_same_tensors(load_state_dict("digits_mlp_sharded"), mlp)
    index = json.loads((FOLDER / "digits_mlp_sharded/model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in mlp.values())}
    assert set(index["weight_map"].values()) == {f"model-0000{shard}-of-00002.safetensors" for shard in (1, 2)}
    assert index["weight_map"]["hidden.weight"] != index["weight_map"]["hidden.bias"]


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_tied_pair_shares_storage(part):
    tied = load_torch("digits_mlp_tied.pt")
    first, second = tied[f"hidden1.{part}"], tied[f"hidden2.{part}"]
    assert first.data_ptr() == second.data_ptr()
    assert first.shape == second.shape


def test_each_tied_name_counts_when_scored(models):
    tied = load_torch("digits_mlp_tied.pt")
    whole = models.accuracy(tied, "digits_mlp_tied")
    for key in ("hidden1.weight", "hidden2.weight"):
        assert models.accuracy(tied | {key: torch.zeros(128, 128)}, "digits_mlp_tied") < whole - 0.5


def test_scoring_refuses_missing_names(models):
    tensors = load_state_dict("digits_mlp.safetensors")
    del tensors["hidden.bias"]
    with pytest.raises(RuntimeError, match=r"hidden\.bias"):
        models.accuracy(tensors, "digits_mlp")


def test_scoring_leaves_the_random_state_alone(models):
    tensors = load_state_dict("digits_cnn.safetensors")
    before = torch.get_rng_state()
    models.accuracy(tensors, "digits_cnn")
    assert torch.equal(torch.get_rng_state(), before)
