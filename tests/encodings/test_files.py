"""What whole files weigh, and that every format can be stored as codes: through the command line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tcompress.formats import FORMATS

SETTINGS = {"sparse-product": "sparse-product:nonzeros=3", "joint": "joint:rank=3:method=svd"}


@pytest.mark.parametrize(
    ("density", "dtype", "most"),
    [(0.5, torch.bfloat16, 0.58), (0.1, torch.bfloat16, 0.18), (0.35, "int4", 0.085), (0.5, "int8", 0.17)],
    ids=str,
)
def test_the_file_of_a_sparse_layer_weighs_what_its_bits_weigh(tcompress, tmp_path, density, dtype, most):
    weight = torch.randn(512, 768, generator=torch.Generator().manual_seed(0))
    codes = ["--dtype", dtype] if isinstance(dtype, str) else []
    save_file({"fc.weight": weight if codes else weight.to(dtype)}, tmp_path / "model.safetensors")
    answer = tcompress(
        "compress", "model.safetensors", "-o", "small.safetensors", "--format", f"sparse:density={density}", *codes
    )
    assert answer.code == 0, answer.err
    assert (tmp_path / "small.safetensors").stat().st_size <= most * (tmp_path / "model.safetensors").stat().st_size
    assert tcompress("verify", "small.safetensors", "--against", "model.safetensors").code == 0


@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_stored_as_codes_verified_and_decompressed(tcompress, model_file, tmp_path, name, codes):
    setting = SETTINGS.get(name, name)
    how = ["--keep", "0.3"] if setting == name else []
    answer = tcompress(
        "compress", model_file, "-o", "small.safetensors", "--format", setting, *how, "--dtype", codes, "--json"
    )
    assert answer.code == 0, answer.err
    layers = json.loads(answer.out)["layers"]
    errors = [layer["relative_error"] for layer in layers if layer["relative_error"] is not None]
    assert errors or name == "joint"  # here are no layers that could share anything
    assert all(error < 1 for error in errors)
    answer = tcompress("verify", "small.safetensors", "--against", model_file)
    assert answer.code == 0, answer.err + answer.out
    assert tcompress("decompress", "small.safetensors", "-o", "dense.safetensors").code == 0
    before, after = load_file(model_file), load_file(tmp_path / "dense.safetensors")
    assert before.keys() == after.keys()
    assert all((after[key].shape, after[key].dtype) == (tensor.shape, tensor.dtype) for key, tensor in before.items())


@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_shared_factors_are_stored_as_codes(tcompress, tmp_path, codes):
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(6, 160, generator=generator)
    tensors = {f"fc{layer}.weight": torch.randn(96, 6, generator=generator) @ basis for layer in range(3)}
    save_file(tensors, tmp_path / "model.safetensors")
    how = ["--format", "joint:rank=6:method=svd", "--dtype", codes]
    assert tcompress("compress", "model.safetensors", "-o", "small.safetensors", *how).code == 0
    with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        manifest = json.loads(file.metadata()["tcompress"])
        assert any(name.startswith("shared.") and name.endswith(".right.codes") for name in file.keys())  # noqa: SIM118
    (shared,) = manifest["shared"].values()
    assert shared == {"right": {"encoding": "dense", "shape": [6, 160], "values": codes}}
    assert tcompress("verify", "small.safetensors", "--against", "model.safetensors").code == 0
    errors = [entry["relative_error"] for entry in manifest["layers"].values()]
    assert all(0 < error < {"int8": 0.02, "int4": 0.2}[codes] for error in errors)
