"""Which way an input takes, and that what is prepared for it is equal."""

from __future__ import annotations

import copy

import pytest
import torch

from tcompress.errors import UsageError
from tcompress.formats.addends import Addends
from tcompress.formats.compressed import compressed_rows
from tcompress.formats.rows import CompressedRows
from tcompress.formats.sparse_product import Chain
from tcompress.formats.staged import PreparedStages
from tcompress.formats.svd import LowRankMatrix
from tcompress.formats.tucker import Tucker
from tcompress.runtime.packed import assemble
from tcompress.runtime.ways import CACHES, Kept, check_cache, prefers_factors, prepare
from tests.runtime.factored import KERNEL, MATRIX, SPARSE, STORES, TEXTS, is_close, numbers, stored, weight_like

every_format = pytest.mark.parametrize("name", TEXTS)
every_store = pytest.mark.parametrize("store", STORES)
GEOMETRIES = [{}, {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}, {"padding": "same"}, {"groups": 2}]


def both(name, store, shape):
    of = stored(name, shape, store)
    return of, prepare(assemble(of.setting, of.shape, of.held(learns=False), torch.float32), of.setting, torch.float32)


@every_store
@every_format
def test_what_is_prepared_runs_as_the_dense_weight_does(name, store):
    of, ready = both(name, store, MATRIX)
    weight = of.weight()
    assert is_close(ready.reconstruct(), weight)
    for x in (numbers(5, 40), numbers(1, 40), numbers(40), numbers(2, 3, 40), numbers(0, 40)):
        found = ready.linear(x)
        assert not found.requires_grad
        assert found.numel() == 0 or is_close(found, x @ weight.T)
        assert found.shape == (*x.shape[:-1], 48)
    ids = torch.tensor([[1, 47, 0], [3, 3, 3]])
    if not isinstance(ready, Chain | CompressedRows | Addends):
        assert is_close(ready.embedding(ids), weight[ids])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@every_store
@every_format
def test_what_is_prepared_convolves_as_the_dense_weight_does(name, store, geometry):
    of, ready = both(name, store, KERNEL)
    x = numbers(2, KERNEL[1] * geometry.get("groups", 1), 7, 8)
    found = ready.conv(x, **geometry)
    assert not found.requires_grad
    assert is_close(found, torch.nn.functional.conv2d(x, of.weight(), **geometry))


@every_store
@every_format
def test_effort_is_positive_and_grows_with_the_positions(name, store):
    for shape in (MATRIX, KERNEL):
        _, ready = both(name, store, shape)
        efforts = [ready.effort(n) for n in (1, 2, 32, 1000, 100_000)]
        assert min(efforts) > 0
        assert sorted(efforts[1:]) == efforts[1:]
        assert ready.effort(8, groups=2, steps=4) > 0


@every_format
def test_what_is_prepared_in_half_types_is_close(name):
    of = stored(name, MATRIX, "own")
    factors = assemble(of.setting, of.shape, of.held(learns=False), torch.bfloat16)
    x = numbers(5, 40)
    found = prepare(factors, of.setting, torch.bfloat16).linear(x.to(torch.bfloat16))
    assert is_close(found, (x @ of.weight().T).to(torch.bfloat16), 0.05)


def low_rank(rank, out=2048, fan_in=2048):
    left, right = torch.zeros(out, rank), torch.zeros(rank, fan_in)
    return LowRankMatrix((out, fan_in), left, right).requires_grad_(False).prepared()


@pytest.mark.parametrize("n", [1, 32, 4096])
def test_few_ranks_go_through_the_factors_and_many_do_not(n):
    assert prefers_factors(low_rank(64), n, {}, Kept(), "cpu")
    assert not prefers_factors(low_rank(2048), n, {}, Kept(), "cpu")


@pytest.mark.parametrize("n", [1, 2, 32])
@every_format
def test_tiny_layers_take_the_dense_weight(name, n):
    assert not prefers_factors(both(name, "own", MATRIX)[1], n, {}, Kept(), "cpu")


def test_a_choice_is_made_once_for_each_size_and_again_for_autocast():
    class Counted(LowRankMatrix):
        calls_of_effort = 0

        def effort(self, n, *, groups=1, steps=1):
            self.calls_of_effort += 1
            return super().effort(n, groups=groups, steps=steps)

    factors, kept = Counted((64, 64), torch.zeros(64, 2), torch.zeros(2, 64)), Kept()
    for n in (1, 1, 2, 3, 5000, 6000, 1):
        prefers_factors(factors, n, {}, kept, "cpu")
    assert factors.calls_of_effort == 3
    with torch.autocast("cpu", torch.bfloat16):
        prefers_factors(factors, 1, {}, kept, "cpu")
    assert factors.calls_of_effort == 4


def test_compressed_rows_are_not_taken_where_types_are_cast():
    rows = CompressedRows(torch.eye(64))
    with torch.autocast("cpu", torch.bfloat16):
        assert not prefers_factors(rows, 5, {}, Kept(), "cpu")


def test_a_kernel_of_few_ranks_goes_through_its_stages():
    weight = weight_like((256, 256, 3, 3))
    ready = Tucker(ranks=(16, 16), order=1).fit(weight).requires_grad_(False).prepared()
    geometry = {"stride": (1, 1), "groups": 1}
    assert isinstance(ready, PreparedStages)
    assert prefers_factors(ready, 1024, geometry, Kept(), "cpu")


def test_compressed_rows_equal_their_matrix():
    matrix = weight_like(MATRIX) * (weight_like(MATRIX, 3) > 0)
    rows = CompressedRows(matrix)
    assert torch.equal(rows.reconstruct(), matrix)
    assert rows.nonzeros == int(torch.count_nonzero(matrix))
    assert compressed_rows(matrix).col_indices().dtype == torch.int32
    for x in (numbers(1, 40), numbers(5, 40), numbers(40), numbers(1, 1, 40), numbers(0, 40)):
        assert rows.linear(x).shape == (*x.shape[:-1], 48)
        assert x.numel() == 0 or is_close(rows.linear(x), x @ matrix.T)
    x = numbers(1, 40).requires_grad_()
    rows.linear(x).sum().backward()
    assert is_close(x.grad[0], matrix.sum(dim=0))
    assert rows.linear(numbers(1, 40).double()[0].float()).shape == (48,)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_layers_are_prepared_as_compressed_rows(name):
    _, ready = both(name, "own", MATRIX)
    assert isinstance(ready, Chain | CompressedRows | Addends)
    assert not ready.can_compile()
    assert both(name, "own", KERNEL)[1].can_compile()


def test_a_cache_is_one_of_three():
    for cache in CACHES:
        check_cache(cache)
    for cache in ("", "Auto", "dense", None):
        with pytest.raises(UsageError, match=r"cache is one of auto, always, never, got"):
            check_cache(cache)


def test_copies_of_what_is_kept_are_empty():
    kept = Kept(state=[(1, 2)], dense=torch.ones(3), prepared=low_rank(2, 8, 8))
    found = copy.deepcopy(kept)
    assert (found.dense, found.prepared, found.state) == (None, None, None)
