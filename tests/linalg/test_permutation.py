"""The permutation against numpy's frozen stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcompress.linalg.permutation import permutation, shuffled, unshuffled


def test_the_order_of_ten_is_the_one_that_numpy_has_always_given():
    assert permutation(10, 0).tolist() == [2, 8, 4, 9, 1, 6, 7, 3, 0, 5]
    assert permutation(10, 2**32 - 1).tolist() == np.random.RandomState(2**32 - 1).permutation(10).tolist()


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_shuffling_is_numpys_and_comes_back(count, seed):
    values = torch.arange(count)
    mixed = shuffled(values, seed)
    assert mixed.tolist() == np.random.RandomState(seed).permutation(count).tolist()
    assert torch.equal(unshuffled(mixed, seed), values)
    assert torch.equal(shuffled(unshuffled(values, seed), seed), values)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_every_type_and_layout_comes_back(dtype):
    tensor = (torch.arange(120).reshape(4, 5, 6) % 7).to(dtype).transpose(0, 2)
    mixed = shuffled(tensor, 3)
    assert mixed.dtype == dtype
    assert mixed.shape == tensor.shape
    assert not torch.equal(mixed, tensor)
    assert torch.equal(unshuffled(mixed, 3), tensor)


def test_tensors_stay_on_their_device():
    assert shuffled(torch.empty(3, 4, device="meta"), 0).device.type == "meta"
    assert unshuffled(torch.empty(3, 4, device="meta"), 0).device.type == "meta"


def test_neither_the_global_generator_is_used_nor_moved():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    shuffled(torch.arange(50), 1)
    assert np.array_equal(before, np.random.get_state()[1])
