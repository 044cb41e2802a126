"""verify finds what is not as it says: bytes, shapes, errors, the wrong original."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import InputError, TcompressError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.compression import compress
from tcompress.workflow.plan import Plan, Rule
from tcompress.workflow.verification import verify

PLAN = Plan((Rule("conv.*", SVD(rank=3)), Rule("*", Sparse(density=0.1))))


@pytest.fixture
def small(model_file, tmp_path) -> Path:
    compress(open_checkpoint(model_file), PLAN, out=tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


def with_manifest(path: Path, change) -> Path:
    """Write the file again with another manifest, its tensors as they are."""
    with open_checkpoint(path) as checkpoint:
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint}
        manifest = json.loads(checkpoint.metadata["tcompress"])
    change(manifest)
    save_file(tensors, path, metadata={"tcompress": json.dumps(manifest)})
    return path


def problems(path, against=None):
    return verify(open_checkpoint(path), against=None if against is None else open_checkpoint(against)).problems


def test_a_sound_file_has_no_problems_and_its_errors_are_measured_again(small, model_file):
    result = verify(open_checkpoint(small), against=open_checkpoint(model_file))
    assert result.problems == ()
    assert len(result.layers) == 5
    assert all(layer.measured_error == pytest.approx(layer.reported_error, rel=1e-5) for layer in result.layers)


def test_any_flipped_byte_is_found(small):
    content, chance = small.read_bytes(), random.Random(0)
    for position in chance.sample(range(len(content)), 150):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        small.write_bytes(damaged)
        try:
            found = problems(small)
        except TcompressError:
            continue
        assert found, f"byte {position}"


def test_a_reported_error_that_is_too_small_is_found_without_the_original(small):
    def flatter(manifest):
        manifest["layers"]["fc.weight"]["relative_error"] = 1e-4

    (*_, last) = [p for p in problems(with_manifest(small, flatter)) if "tensor fc.weight" in p]
    assert "reports an error of 0.0001, but the norms" in last


def test_a_wrong_reported_error_is_found_with_the_original(small, model_file):
    def exaggerate(manifest):
        manifest["layers"]["fc.weight"]["relative_error"] *= 1.01

    found = [p for p in problems(with_manifest(small, exaggerate), model_file) if "tensor fc.weight" in p]
    assert len(found) == 1
    assert "measured is" in found[0]


def test_options_that_contradict_the_factors_are_found(small):
    def boast(manifest):
        manifest["layers"]["conv.weight"]["options"]["rank"] = 4

    found = [p for p in problems(with_manifest(small, boast)) if "tensor conv.weight" in p]
    announced = f"{small}: tensor conv.weight: svd:rank=4 announces a factor"
    assert found == [
        f"{announced} left of shape (32, 4), stored is (32, 3)",
        f"{announced} right of shape (4, 144), stored is (3, 144)",
    ]


def test_another_original_is_found(small, model_file, tmp_path):
    tensors = load_file(model_file)
    tensors["conv.bias"] += 1
    tensors["fc.weight"] *= -1
    tensors["new"] = torch.ones(2)
    save_file(tensors, tmp_path / "other.safetensors")
    found = "\n".join(problems(small, tmp_path / "other.safetensors"))
    assert "is not the checkpoint that" in found
    assert "tensor conv.bias: is not compressed, and yet differs from the original" in found
    assert "tensor fc.weight: reports an error of" in found
    assert "tensor new: is only in" in found


def drawn_anew(tensors):
    """Another training of the same network: only what every network begins with is as it was."""
    noise = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(tensor.shape, generator=noise).to(tensor.dtype) if tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }


def of_other_names(tensors):
    return {f"model.{name}": tensor for name, tensor in tensors.items()}


def of_other_shapes(tensors):
    return {name: tensor[:1] for name, tensor in tensors.items() if tensor.dim() > 1}


@pytest.mark.parametrize("change", [of_other_names, of_other_shapes, drawn_anew])
def test_another_model_is_told_in_one_line(small, model_file, tmp_path, tcompress, change):
    save_file(change(load_file(model_file)), tmp_path / "other.safetensors")
    answer = tcompress("verify", small.name, "--against", "other.safetensors")
    problem = (
        "other.safetensors: is not the checkpoint that small.safetensors was made from: its SHA-256 is another, "
        "and no tensor is the same; it is another model, or was trained anew"
    )
    assert answer.code == 8
    assert answer.out.splitlines() == [
        f"problem: {problem}",
        "small.safetensors has 1 problem(s): 5 compressed layers, errors not measured again",
    ]


@pytest.mark.parametrize("kept", ["fc.weight", "bn.running_mean"])
def test_a_checkpoint_with_a_tensor_of_the_original_is_compared_tensor_by_tensor(model_file, tmp_path, kept):
    tensors = load_file(model_file) | {"bn.running_mean": torch.arange(4.0)}
    save_file(tensors, tmp_path / "with_mean.safetensors")
    compress(open_checkpoint(tmp_path / "with_mean.safetensors"), PLAN, out=tmp_path / "small.safetensors")
    anew = drawn_anew(tensors) | {"bn.running_mean": torch.arange(4.0) + 1, kept: tensors[kept]}
    save_file(anew, tmp_path / "other.safetensors")
    found = problems(tmp_path / "small.safetensors", tmp_path / "other.safetensors")
    assert len(found) > 4
    assert [problem for problem in found if f"tensor {kept}: " in problem] == []


def test_the_manifest_beside_shards_is_compared_with_them(fixtures, tmp_path):
    compress(open_checkpoint(fixtures / "digits_mlp_sharded"), Plan((Rule("*", SVD(rank=4)),)), out=tmp_path / "out")
    assert problems(tmp_path / "out", fixtures / "digits_mlp_sharded") == ()
    sidecar = tmp_path / "out" / "tcompress.json"
    sidecar.write_text(sidecar.read_text().replace('"rank":4', '"rank":5', 1))
    assert problems(tmp_path / "out") == (f"{sidecar}: does not say what the shards say",)
    sidecar.unlink()
    assert "tcompress.json: cannot be read" in problems(tmp_path / "out")[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["layers"]["fc.weight"]["factors"].pop("matrix"), "its manifest entry is damaged"),
        (lambda m: m["layers"]["fc.weight"]["factors"]["matrix"].update(shape=[64, 81]), "tensor fc.weight: "),
        (lambda m: m["layers"]["fc.weight"].update(shape=[1 << 30, 1 << 30]), "claims a dense shape"),
        (lambda m: m["layers"]["fc.weight"].update(format="magic"), "does not know"),
        (lambda m: m["layers"].update(other=m["layers"]["fc.weight"]), "is not in the file"),
        (lambda m: m.update(tied={"a": "b"}), "is tied to b, which cannot be"),
        (lambda m: m["layers"]["fc.weight"].update(options={"density": [1] * 99}), "senseless options"),
        (lambda m: m.update(version=2), "reads up to version 1"),
    ],
)
def test_a_manifest_that_lies_is_refused_by_name(small, change, problem):
    with_manifest(small, change)
    try:
        found = "\n".join(problems(small))
    except InputError as error:
        found = str(error)
    assert problem in found
