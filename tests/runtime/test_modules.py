"""Factorised layers called like the dense ones: values, gradients, types, copies, and nothing kept for too long."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tcompress.runtime import modules
from tcompress.runtime.install import collect, obstacle
from tests.runtime.factored import (
    CACHES,
    KERNEL,
    STORES,
    TEXTS,
    conv,
    embedding,
    frozen,
    is_close,
    linear,
    numbers,
    replaced,
    stored,
    twin,
)

every_format = pytest.mark.parametrize("name", TEXTS)
every_store = pytest.mark.parametrize("store", STORES)
few_stores = pytest.mark.parametrize("store", ["own", "int8"])
every_cache = pytest.mark.parametrize("cache", CACHES)
some_formats = pytest.mark.parametrize("name", ["svd", "cp", "sparse", "low-rank-sparse", "sparse-product", "shuffled"])

IDS = torch.tensor([[1, 3, 47], [0, 3, 3]])
KINDS = {
    "many": (linear, numbers(5, 40)),
    "one": (linear, numbers(1, 40)),
    "vector": (linear, numbers(40)),
    "batches": (linear, numbers(2, 3, 40)),
    "none": (linear, numbers(0, 40)),
    "images": (conv, numbers(2, 12, 6, 7)),
    "image": (conv, numbers(12, 5, 5)),
    "no images": (conv, numbers(0, 12, 5, 5)),
    "ids": (embedding, IDS),
    "id": (embedding, IDS[0, 0]),
    "no ids": (embedding, IDS[:0]),
}


@pytest.fixture(params=[False, True], ids=["chosen", "factors"])
def way(request, monkeypatch):
    """As it is chosen, and always through the factors where both are possible."""
    if request.param:
        monkeypatch.setattr(modules, "prefers_factors", lambda *_: not torch.is_autocast_enabled("cpu"))


@pytest.mark.usefixtures("way")
@every_store
@every_format
def test_a_layer_answers_as_the_dense_one_does(name, store):
    kinds = KINDS if store in {"own", "int8"} else ("many", "images", "ids")
    for kind in kinds:
        build, x = KINDS[kind]
        for cache in CACHES:
            dense, layer = build(name, store, cache)
            for learns in (True, False):
                for grad in (True, False) if learns else (True,):
                    dense.requires_grad_(learns)
                    layer.requires_grad_(learns)
                    with torch.set_grad_enabled(grad):
                        expected, found = dense(x), layer(x)
                    assert found.shape == expected.shape
                    assert found.dtype == expected.dtype
                    assert found.requires_grad == (grad and learns and any(p.requires_grad for p in layer.parameters()))
                    if cache == "always" and not (learns and grad):
                        assert torch.equal(found, expected), (kind, cache)
                    assert expected.numel() == 0 or is_close(found, expected), (kind, cache)


GEOMETRIES = [
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0), "dilation": (1, 2), "bias": False},
    {"padding": "same", "dilation": 2},
    {"padding": "valid"},
    *({"padding": (1, 2), "padding_mode": mode} for mode in ("reflect", "replicate", "circular")),
    {"padding": "same", "padding_mode": "reflect"},
]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["svd", "spatial svd", "ttm", "cp", "reshaped-sum", "joint"])
def test_every_geometry_of_a_convolution_is_kept(name, geometry, groups):
    of = stored(name, KERNEL)
    dense = twin(nn.Conv2d(KERNEL[1] * groups, KERNEL[0], 3, groups=groups, **geometry), of)
    x = numbers(2, KERNEL[1] * groups, 6, 7)
    for cache in CACHES:
        layer = frozen(replaced(dense, of, cache))
        for image in (x, x[0]):
            with torch.no_grad():
                expected, found = dense(image), layer(image)
            assert torch.equal(found, expected) if cache == "always" else is_close(found, expected)
        dense.requires_grad_(True)


@pytest.mark.parametrize("shape", [(16, 12, 5), (16, 12, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("groups", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("way")
@every_format
def test_one_and_three_dimensions(name, groups, shape):
    of = stored(name, shape)
    kind = {3: nn.Conv1d, 5: nn.Conv3d}[len(shape)]
    dense = twin(kind(12 * groups, 16, shape[2:], groups=groups, padding=1, stride=2), of)
    x = numbers(2, 12 * groups, *(7 for _ in shape[2:]))
    for cache in CACHES:
        layer = frozen(replaced(dense, of, cache))
        with torch.no_grad():
            assert is_close(layer(x), dense(x))
            assert is_close(layer(x[0]), dense(x[0]))
        dense.requires_grad_(True)


def test_attributes_are_those_of_the_layers_that_were_there():
    _, layer = linear("svd", bias=False)
    assert (layer.in_features, layer.out_features, layer.bias) == (40, 48, None)
    dense, layer = conv("svd", stride=2, padding=1, groups=1)
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(dense, name)
    _, layer = embedding("svd", padding_idx=3)
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (48, 40, 3)
    assert set(collect(nn.Sequential(nn.ReLU(), layer))) == {"1.weight"}


@every_cache
@few_stores
@every_format
def test_gradients_reach_every_factor_that_learns_and_the_input(name, store, cache):
    for build, x in (KINDS["many"], KINDS["images"], KINDS["ids"]):
        dense, layer = build(name, store, cache)
        learning = {key: held for key, held in layer.factors.named_parameters() if held.requires_grad}
        if not learning and not x.is_floating_point():
            continue
        # The gradient of the dense weight, taken on to the factors by its own rule, is what each factor gets.
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
        (layer(inputs[0]) ** 2).sum().backward()
        (dense(inputs[1]) ** 2).sum().backward()
        found = {key: held.grad for key, held in learning.items()}
        assert all(grad is not None for grad in found.values())
        assert not x.is_floating_point() or is_close(inputs[0].grad, inputs[1].grad)
        assert layer.bias is None or is_close(layer.bias.grad, dense.bias.grad)
        layer.zero_grad()
        if learning:
            layer.weight.backward(dense.weight.grad)
            assert all(is_close(found[key], held.grad.to(found[key].dtype), 0.02) for key, held in learning.items())


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("cache", ["auto", "never"])
@few_stores
@every_format
def test_frozen_factors_hand_gradients_to_the_input_alone(name, store, cache):
    for build, x in (KINDS["many"], KINDS["one"], KINDS["images"]):
        dense, layer = build(name, store, cache)
        frozen(dense)
        frozen(layer)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for each, start in zip((layer, dense), inputs, strict=True):
            (each(start) ** 2).sum().backward()
        assert is_close(inputs[0].grad, inputs[1].grad)
        assert all(held.grad is None for held in layer.parameters())


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam one by one": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
}


def shows_the_factors(layer, x):
    """Whether what a layer answers is what its factors give now."""
    with torch.no_grad():
        fresh = copy.deepcopy(layer)
        return is_close(layer(x), fresh(x)) and torch.equal(layer.weight, fresh.weight)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("training", [True, False])
@every_cache
@pytest.mark.parametrize("name", ["svd", "sparse", "shuffled"])
def test_nothing_stale_is_answered_after_a_step(name, cache, training, optimizer):
    for build, x in (KINDS["many"], KINDS["ids"]):
        layer = build(name, "own", cache)[1].train(training)
        step = OPTIMIZERS[optimizer](layer.parameters())
        with torch.no_grad():
            before = layer(x)
            assert torch.equal(layer(x), before)
        layer(x).sum().backward()
        step.step()
        with torch.no_grad():
            assert not torch.equal(layer(x), before)
        assert shows_the_factors(layer, x)


@pytest.mark.usefixtures("way")
@every_cache
@few_stores
@some_formats
def test_nothing_stale_is_answered_after_a_state_dict_or_a_change_in_place(name, store, cache):
    layer, other = linear(name, store, cache)[1].eval(), linear(name, store, cache)[1].eval()
    x = KINDS["many"][1]
    with torch.no_grad():
        before = layer(x)
        other(x)
        for held in (*other.factors.parameters(), *(b for b in other.factors.buffers() if b.is_floating_point())):
            held.mul_(2)
        changed = other(x)
        assert not torch.equal(changed, before)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), changed)
        layer.load_state_dict(linear(name, store, cache)[1].state_dict(), assign=True)
        layer.load_state_dict({"bias": before.new_zeros(48)}, strict=False)
        assert not torch.equal(layer(x), changed)
    assert shows_the_factors(layer, x)


@pytest.mark.usefixtures("way")
@every_cache
@few_stores
@some_formats
def test_a_first_call_without_gradients_does_not_hinder_training(name, store, cache):
    for build, x in (KINDS["many"], KINDS["images"], KINDS["ids"]):
        for context in (torch.inference_mode, torch.no_grad):
            layer = build(name, store, cache)[1]
            with context():
                first = layer(x)
            found = layer(x)
            assert is_close(found.detach(), first.clone())
            if found.requires_grad:
                found.sum().backward()
            frozen(layer)
            if x.is_floating_point():
                start = x.clone().requires_grad_()
                layer(start).sum().backward()
                assert start.grad is not None


@every_cache
def test_a_model_made_under_inference_mode_answers(cache):
    with torch.inference_mode():
        dense, layer = linear("svd", "int8", cache)
        assert is_close(layer(KINDS["many"][1]), dense(KINDS["many"][1]))


@pytest.mark.parametrize("cache", ["auto", "never"])
@few_stores
@every_format
def test_the_padding_row_of_an_embedding_learns_nothing(name, store, cache):
    dense, layer = embedding(name, store, cache, padding_idx=3)
    found = layer(IDS)
    assert is_close(found, dense(IDS))
    if not found.requires_grad:
        return
    layer(torch.tensor([3, 3])).sum().backward()
    assert not any(held.grad is not None and held.grad.any() for held in layer.parameters())
    layer(torch.arange(48)).sum().backward()
    assert any(held.grad is not None and held.grad.any() for held in layer.parameters())


@pytest.mark.usefixtures("way")
@every_cache
@few_stores
@some_formats
def test_autocast_gives_what_the_dense_layer_gives(name, store, cache):
    for build, x in (KINDS["many"], KINDS["one"], KINDS["images"], KINDS["ids"]):
        dense, layer = build(name, store, cache)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
                expected, found = dense(x), layer(x)
            # Terms of codes cancel out in cp, and are rounded before they do.
            assert is_close(found, expected, 0.2 if store == "int4" else 0.04)
        assert is_close(layer(x), dense(x))


@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.bfloat16, 0.05), (torch.half, 0.01), (torch.double, 1e-6)], ids=str
)
@every_store
@some_formats
def test_a_model_is_cast(name, store, dtype, relative):
    for build, x in (KINDS["many"], KINDS["images"], KINDS["ids"]):
        for cache in CACHES:
            dense, layer = build(name, store, cache)
            with torch.no_grad():
                layer(x)
            codes = {key: held.dtype for key, held in layer.factors.named_buffers()}
            dense, layer = dense.to(dtype), layer.to(dtype)
            cast = x.to(dtype) if x.is_floating_point() else x
            assert {key: held.dtype for key, held in layer.factors.named_buffers()} == codes
            assert layer.weight.dtype == dtype
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    assert is_close(layer(cast), dense(cast), 4 * relative if store == "int4" else relative)


@pytest.mark.usefixtures("way")
@every_cache
@few_stores
@some_formats
def test_copies_answer_alike_and_share_nothing_that_is_kept(name, store, cache):
    layer, x = linear(name, store, cache)[1], KINDS["many"][1]
    with torch.no_grad():
        expected = layer(x)
        for found in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert found._kept is not layer._kept
            assert found._kept.dense is None
            assert found._kept.prepared is None
            assert torch.equal(found(x), expected)
            for held in (*found.factors.parameters(), *(b for b in found.factors.buffers() if b.is_floating_point())):
                held.mul_(2)
            assert not torch.equal(found(x), expected)
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("cache", ["auto", "never"])
@few_stores
@every_format
def test_a_layer_goes_to_the_meta_device_and_back(name, store, cache):
    for build, x in (KINDS["many"], KINDS["images"], KINDS["ids"]):
        layer = build(name, store, cache)[1]
        state, expected = copy.deepcopy(layer.state_dict()), layer(x).detach()
        layer.to("meta")
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert layer(x.to("meta")).shape == expected.shape
        layer.to_empty(device="cpu").load_state_dict(state)
        with torch.no_grad():
            assert is_close(layer(x), expected)


@every_store
@every_format
def test_a_layer_that_keeps_nothing_keeps_nothing(name, store):
    for build, x in (KINDS["many"], KINDS["images"], KINDS["ids"]):
        layer = build(name, store, "never")[1]
        with torch.no_grad():
            layer(x)
        assert layer.weight.shape == layer.factors.shape
        assert layer._kept.dense is None
        assert layer._kept.prepared is None


def test_what_is_kept_is_kept():
    layer = linear("svd", "int8", "always")[1].requires_grad_(False)
    layer(KINDS["many"][1])
    kept = layer._kept.dense
    layer(KINDS["many"][1])
    assert layer._kept.dense is kept
    assert layer.weight is kept
    layer.train()
    assert layer._kept.dense is None


def test_the_obstacles():
    assert obstacle(nn.Linear(2, 2), "weight") is None
    assert obstacle(nn.Linear(2, 2), "bias") == "bias is no layer's weight"
    assert "neither" in obstacle(nn.ConvTranspose2d(2, 2, 3), "weight")


@pytest.mark.parametrize("shape", [(16, 12, 1, 3), (16, 12, 3, 1), (16, 1, 4, 3), (16, 12, 1, 1)], ids=str)
@every_format
def test_the_dense_weight_lies_in_memory_as_one_from_a_file_does(name, shape):
    of = stored(name, shape)
    layer = replaced(nn.Conv2d(shape[1], shape[0], shape[2:]), of, "always")
    with torch.no_grad():
        assert layer.weight.stride() == torch.empty(shape).stride()
        assert torch.equal(layer.weight, of.weight())
