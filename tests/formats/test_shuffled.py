"""shuffled against independent truth: numpy's permutation, and what shuffling does to structure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tcompress.errors import FormatError
from tcompress.formats import make, parse
from tcompress.formats.shuffled import Shuffled
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker

PLAIN = {"svd": SVD, "tt": TT, "ttm": TTMatrix, "tucker": Tucker}


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lost(weight, setting):
    found = setting.fit(weight).reconstruct().detach()
    return float((found.double() - weight.double()).norm() / weight.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
@pytest.mark.parametrize("shape", [(24, 20), (16, 8, 3, 3)], ids=str)
def test_it_is_the_inner_format_of_the_weight_in_numpys_order(shape, seed, dtype):
    weight = tensor_of(*shape, dtype=dtype)
    order = np.random.RandomState(seed).permutation(math.prod(shape))
    mixed = torch.from_numpy(weight.numpy().reshape(-1)[order].reshape(shape))
    inner = SVD(rank=4).fit(mixed).reconstruct().detach().numpy()
    back = np.empty(math.prod(shape), dtype=inner.dtype)
    back[order] = inner.reshape(-1)
    found = Shuffled(rank=4, seed=seed).fit(weight).reconstruct().detach()
    assert found.dtype == dtype
    assert np.array_equal(found.numpy(), back.reshape(shape))


@pytest.mark.parametrize("inner", PLAIN)
@pytest.mark.parametrize("shape", [(32, 36), (32, 16, 3, 3)], ids=str)
def test_noise_loses_no_more_shuffled_than_as_it_is(inner, shape):
    setting = PLAIN[inner].within(shape, torch.float32, math.prod(shape) * 4 // 3)
    plain = [lost(tensor_of(*shape, seed=seed), setting) for seed in range(6)]
    size = {name: value for name, value in setting.options().items() if name in {"rank", "ranks"}}
    mixed = [lost(tensor_of(*shape, seed=seed), Shuffled(**size, inner=inner)) for seed in range(6)]
    spread = np.std(plain + mixed) + 1e-4
    assert abs(np.mean(plain) - np.mean(mixed)) < 3 * spread
    assert abs(np.mean(plain) - np.mean(mixed)) < 0.02


def kronecker_sum(rows, columns, rank):
    parts = [torch.kron(tensor_of(rows, columns, seed=k), tensor_of(rows, columns, seed=k + 50)) for k in range(rank)]
    return torch.stack(parts).sum(0)


STRUCTURED = {
    "svd": tensor_of(36, 3) @ tensor_of(3, 36, seed=1),
    "tt": torch.outer(torch.arange(36.0), torch.ones(36)) + 3,
    "ttm": kronecker_sum(6, 6, 2),
    "tucker": torch.einsum("ap,bq,pqk->abk", tensor_of(16, 3), tensor_of(16, 3, seed=1), tensor_of(3, 3, 9)).reshape(
        16, 16, 3, 3
    ),
}


@pytest.mark.parametrize("inner", STRUCTURED)
def test_structure_is_lost_by_shuffling(inner):
    weight = STRUCTURED[inner]
    assert lost(weight, PLAIN[inner](rank=3)) < 1e-4
    assert lost(weight, Shuffled(rank=3, inner=inner)) > 0.3


def test_seeds_give_different_orders():
    weight = tensor_of(24, 20)
    first, second = (Shuffled(rank=3, seed=seed).fit(weight).reconstruct() for seed in (0, 1))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    "inner", ["tt:order=3", "tt:out_modes=4,6:in_modes=4,5", "svd:matricisation=spatial", "cp:starts=1:seed=4"]
)
def test_text_carries_the_options_of_the_inner_format(inner):
    setting = Shuffled(rank=3, inner=inner, seed=5)
    assert ":inner." in str(setting)
    name, options = parse(str(setting))
    assert make(name, options) == setting


@pytest.mark.parametrize(
    "text",
    [
        "shuffled:rank=3:inner=tt:inner.order=3:inner.padding=0,0",
        "shuffled:ranks=2,3,2:inner=tucker:seed=9",
    ],
)
def test_text_gives_the_format(text):
    name, options = parse(text)
    found = make(name, options)
    again, its_options = parse(str(found))
    assert make(again, its_options) == found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 3, "inner": "sparse"}, "shuffled: inner is one of svd, tt, ttm, tucker, cp, got 'sparse'"),
        ({"rank": 3, "inner": "shuffled"}, "shuffled: inner is one of"),
        ({"rank": 3, "inner": 5}, "shuffled: inner is the name of a format, got 5"),
        ({"rank": 3, "inner": "tt:rank=3"}, "shuffled: the rank is shuffled's own option"),
        ({"rank": 3, "inner": "tt:colour=3"}, "tt: has no option colour"),
        ({"ranks": (3, 3), "inner": "svd"}, "shuffled: svd has one rank, not several"),
        ({"rank": 3, "seed": 2**32}, "shuffled: seed must be at most"),
        ({"rank": 3, "ranks": (3,), "inner": "tt"}, "shuffled: give one of rank and ranks"),
        ({}, "shuffled: give one of rank and ranks"),
    ],
    ids=str,
)
def test_senseless_options_are_refused_by_name(options, said):
    with pytest.raises(FormatError) as caught:
        Shuffled(**options)
    assert str(caught.value).startswith(said)
