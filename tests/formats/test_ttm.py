"""ttm against independent truth."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import scipy.linalg
import tensorly
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorly.decomposition import tensor_train_matrix

from tcompress.formats import ttm
from tcompress.formats.ttm import TTMatrix


def tensor_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lost(weight, setting):
    return float((setting.fit(weight).reconstruct().detach().double() - weight.double()).norm())


def values(setting, shape):
    return sum(spec.values for spec in setting.factor_specs(shape, torch.float32).values())


@pytest.mark.parametrize(("rank", "expected"), [(1, 144), (2, 528), (4, 2016)])
def test_the_layer_of_novikov_has_the_parameters_of_his_table(rank, expected):
    """fc6 of VGG-16, 713,614, 194,622 and 50,972 times smaller."""
    modes = {"out_modes": (4, 4, 4, 4, 4, 4), "in_modes": (2, 7, 8, 8, 7, 4)}
    assert values(TTMatrix(rank=rank, **modes), (4096, 25088)) == expected
    turned = {"out_modes": (2, 7, 8, 8, 7, 4), "in_modes": (4, 4, 4, 4, 4, 4)}
    assert values(TTMatrix(rank=rank, **turned), (25088, 4096)) == expected
    assert 25088 * 4096 // expected == {1: 713_614, 2: 194_622, 4: 50_972}[rank]


def test_two_layers_of_novikov_are_37732_times_smaller():
    fc6 = TTMatrix(rank=4, out_modes=(4,) * 6, in_modes=(2, 7, 8, 8, 7, 4))
    fc7 = TTMatrix(rank=4, out_modes=(4,) * 6, in_modes=(4,) * 6)
    stored = values(fc6, (4096, 25088)) + values(fc7, (4096, 4096))
    assert stored == 3168
    assert (25088 + 4096) * 4096 // stored == 37_732


def test_parameters_of_a_kernel_are_those_of_r_tt():
    ranks = (3, 4, 5)
    setting = TTMatrix(ranks=ranks, out_modes=(4, 4, 4), in_modes=(2, 4, 4))
    assert values(setting, (64, 32, 3, 3)) == 4 * 2 * 3 + 3 * 4 * 4 * 4 + 4 * 4 * 4 * 5 + 5 * 9


def hilbert_like(*shape):
    return (1 / (1 + torch.arange(math.prod(shape)) % 97.0)).reshape(shape) + 0.01 * tensor_of(*shape)


def kernel_like(*shape):
    left, right = tensor_of(shape[0], 6), tensor_of(shape[1], 6, seed=1)
    decay = torch.arange(1, 7) ** -1.5
    spatial = tensor_of(9, 6, seed=2)
    return torch.einsum("ar,br,kr,r->abk", left, right, spatial, decay).reshape(shape) + 0.02 * tensor_of(
        *shape, seed=3
    )


@pytest.mark.parametrize("weight", [tensor_of(96, 128), hilbert_like(96, 128)], ids=["random", "structured"])
@pytest.mark.parametrize(
    ("out_modes", "in_modes"), [((8, 12), (16, 8)), ((4, 4, 6), (8, 4, 4)), ((2, 4, 3, 4), (4, 2, 4, 4))], ids=str
)
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_error_is_at_most_tensorlys(weight, out_modes, in_modes, rank):
    setting = TTMatrix(rank=rank, out_modes=out_modes, in_modes=in_modes)
    ranks = setting.clipped(setting.folding((96, 128)))
    folded = weight.double().numpy().reshape(*out_modes, *in_modes)
    theirs = tensorly.tt_matrix.tt_matrix_to_tensor(tensor_train_matrix(folded, rank=[1, *ranks, 1]))
    norm = np.linalg.norm(folded)
    assert lost(weight, setting) <= np.linalg.norm(theirs.reshape(folded.shape) - folded) + 1e-6 * norm


@pytest.mark.parametrize("weight", [tensor_of(64, 64, 3, 3), kernel_like(64, 64, 3, 3)], ids=["random", "trained-like"])
@pytest.mark.parametrize("rank", [1, 5, 9])
def test_the_error_of_a_kernel_is_at_most_that_of_tensorlys_train(weight, rank):
    setting = TTMatrix(rank=rank)
    folded = weight.double().numpy().reshape(8, 8, 8, 8, 9).transpose(0, 2, 1, 3, 4).reshape(64, 64, 9)
    theirs = tensorly.tt_to_tensor(tensorly.decomposition.tensor_train(folded, rank=[1, rank, rank, 1]))
    assert lost(weight, setting) <= np.linalg.norm(theirs - folded) + 1e-6 * np.linalg.norm(folded)


@given(st.sampled_from([(12, 8), (16, 36), (8, 9, 3), (8, 8, 2, 2)]), st.integers(1, 9), st.sampled_from([2, 3]))
@settings(deadline=None, max_examples=40)
def test_the_error_lies_between_the_largest_tail_and_all_of_them(shape, rank, order):
    weight, setting = tensor_of(*shape, dtype=torch.float64), TTMatrix(rank=rank, order=order)
    folding = setting.folding(shape)
    folded = folding.fold(weight)
    left_out = [
        float(torch.linalg.svdvals(folded.reshape(math.prod(folded.shape[: k + 1]), -1))[r:].square().sum())
        for k, r in enumerate(setting.clipped(folding))
    ]
    found = lost(weight, setting) ** 2
    assert found <= sum(left_out) + 1e-9
    if not folding.is_padded:
        assert found >= max(left_out) - 1e-9


def laplacian(bits):
    n = 2**bits
    return 2 * torch.eye(n) - torch.diag(torch.ones(n - 1), 1) - torch.diag(torch.ones(n - 1), -1)


def dense_kronecker(*sizes):
    return torch.from_numpy(reduce(np.kron, [tensor_of(*size, seed=k).numpy() for k, size in enumerate(sizes)]))


RANK_ONE = {
    "Hadamard": (torch.from_numpy(scipy.linalg.hadamard(64)).float(), {"order": 6}),
    "identity": (torch.eye(64), {"order": 6}),
    "identity in thirds": (torch.eye(60), {"out_modes": (3, 4, 5), "in_modes": (3, 4, 5)}),
    "Kronecker product": (dense_kronecker((3, 5), (4, 2), (2, 6)), {"out_modes": (3, 4, 2), "in_modes": (5, 2, 6)}),
    "ones": (torch.ones(24, 36), {"order": 3}),
    "zero": (torch.zeros(24, 36), {"order": 3}),
}


@pytest.mark.parametrize(("weight", "options"), RANK_ONE.values(), ids=RANK_ONE.keys())
def test_kronecker_products_have_rank_one(weight, options):
    found = TTMatrix.reaching(weight, 1e-6, **options)
    assert set(found.ranks) == {1}
    torch.testing.assert_close(found.fit(weight).reconstruct().detach(), weight)


def test_a_sum_of_three_kronecker_products_has_rank_three():
    weight = sum(torch.kron(tensor_of(6, 8, seed=k), tensor_of(5, 4, seed=k + 9)) for k in range(3))
    options = {"out_modes": (6, 5), "in_modes": (8, 4)}
    assert TTMatrix.reaching(weight, 1e-5, **options).ranks == (3,)
    assert lost(weight, TTMatrix(rank=2, **options)) > 0.01


@pytest.mark.parametrize("bits", [3, 5, 7])
def test_the_laplacian_of_a_line_has_rank_three(bits):
    """Kazeev & Khoromskij 2012: the quantised one-dimensional Laplacian, Dirichlet ends."""
    found = TTMatrix.reaching(laplacian(bits), 1e-6, order=bits)
    assert max(found.ranks) == 3
    assert lost(laplacian(bits), found) < 1e-5
    assert lost(laplacian(bits), TTMatrix(rank=2, order=bits)) > 0.1


def test_a_single_pair_is_the_weight_itself():
    """Where tensorly's tensor_train_matrix returns the matrix as well, whatever the rank."""
    weight = tensor_of(7, 9)
    found = TTMatrix(rank=1, order=1).fit(weight)
    assert torch.equal(found.reconstruct(), weight)
    assert TTMatrix(rank=1, order=1).richer((7, 9)) is None
    assert TTMatrix.reaching(weight, 0.5, order=1) == TTMatrix(rank=1, order=1)


def test_the_core_of_a_single_pair_is_no_view_of_the_weight():
    weight = tensor_of(7, 9)
    found = TTMatrix(rank=1, order=1).fit(weight)
    with torch.no_grad():
        found.cores[0].zero_()
    assert weight.any()


STRUCTURED = {
    "random": tensor_of(31, 37),
    "Kronecker sum": torch.kron(tensor_of(6, 8), torch.eye(5, 4)) + torch.kron(torch.ones(6, 8), tensor_of(5, 4)),
    "zero": torch.zeros(24, 20),
    "constant": torch.full((24, 20), -7.0),
    "kernel": kernel_like(32, 16, 3, 3),
    "one value": torch.nn.functional.pad(torch.ones(1, 1), (3, 5, 4, 7)),
}


@pytest.mark.parametrize("weight", STRUCTURED.values(), ids=STRUCTURED.keys())
@pytest.mark.parametrize("wanted", [0.9, 0.3, 0.03, 1e-3, 1e-5])
def test_what_is_reached_is_within_the_error_and_its_last_rank_minimal(weight, wanted):
    found, norm = TTMatrix.reaching(weight, wanted), float(weight.double().norm())
    assert lost(weight, found) <= wanted * norm * (1 + 1e-6) + 1e-6 * norm
    if found.ranks[-1] > 1:
        poorer = TTMatrix(ranks=(*found.ranks[:-1], found.ranks[-1] - 1))
        assert lost(weight, poorer) > wanted * norm * (1 - 1e-6)


@pytest.mark.parametrize("shape", [(40,), (3, 13), (0,), ()], ids=str)
def test_inputs_go_through_the_cores_some_at_a_time_with_the_gradients_of_the_dense_weight(shape, monkeypatch):
    factors = TTMatrix(rank=2).fit(tensor_of(48, 35))
    most = max(
        math.prod(core.shape[1] for core in factors.cores[: k + 1])
        * math.prod(core.shape[2] for core in factors.cores[k + 1 :])
        * factors.cores[k].shape[3]
        for k in range(len(factors.cores))
    )
    monkeypatch.setattr(ttm, "_STATE_AT_ONCE", 7 * most)
    sizes = []
    plain = ttm.contracted
    monkeypatch.setattr(ttm, "contracted", lambda x, *rest: sizes.append(len(x)) or plain(x, *rest))
    x = tensor_of(*shape, 35, seed=1).requires_grad_()
    weights = torch.linspace(-1, 1, 48)
    found = torch.autograd.grad((factors.linear(x) * weights).square().sum(), [x, *factors.cores])
    expected = torch.autograd.grad(((x @ factors.reconstruct().T) * weights).square().sum(), [x, *factors.cores])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-3) for one, other in zip(found, expected, strict=True))
    count = math.prod(shape)
    assert sizes == [7] * (count // 7) + ([count % 7] if count % 7 or not count else [])
    with torch.no_grad():
        factors.linear(x)
    assert sizes[-1] == count
