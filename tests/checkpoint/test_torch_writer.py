"""A torch checkpoint made from a safetensors file: torch.load gives the state dict, ties share their storage."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.memory import require_memory
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.torch_writer import write_torch
from tcompress.errors import SafetyError

TENSORS = {
    "b.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.empty(0, 4),
}
TIED = {"head.weight": "b.weight"}
NAMES = ["head.weight", "b.weight", "steps", "empty", "a.bias"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.fixture
def staged(tmp_path):
    save_file(TENSORS, tmp_path / "staged.safetensors")
    return open_checkpoint(tmp_path / "staged.safetensors")


def test_names_order_values_and_ties_are_those_that_were_asked_for(path, staged):
    write_torch(path, staged, names=NAMES, tied=TIED, key=None)
    state = torch.load(path, weights_only=True)
    assert list(state) == NAMES
    for name, tensor in state.items():
        expected = TENSORS[TIED.get(name, name)]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor, expected)
    assert state["head.weight"].data_ptr() == state["b.weight"].data_ptr()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tied == {"b.weight": "head.weight"}


def test_a_nested_checkpoint_is_nested_again(path, staged):
    write_torch(path, staged, names=["steps"], tied={}, key="ema.model")
    assert torch.load(path, weights_only=True) == {"ema": {"model": {"steps": torch.tensor(7)}}}
    with open_checkpoint(path, key="ema.model") as checkpoint:
        assert list(checkpoint) == ["steps"]


def test_the_same_tensors_give_the_same_bytes(path, staged):
    write_torch(path, staged, names=NAMES, tied=TIED, key=None)
    first = path.read_bytes()
    write_torch(path, staged, names=NAMES, tied=TIED, key=None)
    assert path.read_bytes() == first


def test_a_dense_shape_that_fits_no_machine_is_refused():
    require_memory((1000, 1000), torch.float32, path="small.safetensors", tensor="fc")
    with pytest.raises(SafetyError) as caught:
        require_memory((2**31, 2**31), torch.bfloat16, path="small.safetensors", tensor="fc")
    problem = f"claims a dense shape of (2147483648, 2147483648), {2**64} bytes; this machine has "
    assert str(caught.value).startswith(f"small.safetensors: tensor fc: {problem}")
