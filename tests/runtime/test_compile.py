"""torch.compile without breaks: every format, fresh and warmed up, with gradients and without, and after changes."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.runtime.factored import CACHES, TEXTS, conv, embedding, frozen, is_close, linear, numbers

KINDS = {
    "linear": (linear, numbers(5, 40)),
    "conv": (conv, numbers(2, 12, 6, 7)),
    "embedding": (embedding, torch.tensor([[3, 7], [0, 47]])),
}
CASES = [
    ("svd", "linear", "own", "auto"),
    ("tt", "linear", "int8", "never"),
    ("cp", "linear", "own", "auto"),
    ("sparse", "linear", "own", "auto"),
    ("masking low-rank-sparse", "linear", "int8", "never"),
    ("sparse-product", "linear", "own", "auto"),
    ("shuffled", "linear", "int8", "always"),
    ("tucker", "conv", "bf16", "never"),
    ("joint", "embedding", "int4", "auto"),
]
pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def compiled(layer, backend="eager"):
    return torch.compile(layer, backend=backend, fullgraph=True)


def is_the_same(name, kind, store, cache, backend, *, grad, warm):
    torch.compiler.reset()
    build, x = KINDS[kind]
    dense, layer = build(name, store, cache)
    with torch.set_grad_enabled(grad):
        if warm:
            layer(x)
        run, expected = compiled(layer, backend), dense(x)
        found = [run(x) for _ in range(2)]
    if grad and found[-1].requires_grad:
        found[-1].sum().backward()
    return all(is_close(each.detach(), expected.detach()) for each in found)


@pytest.mark.parametrize(("name", "kind", "store", "cache"), CASES)
def test_every_format_is_compiled_whole(name, kind, store, cache):
    assert is_the_same(name, kind, store, cache, "aot_eager", grad=False, warm=False)
    assert is_the_same(name, kind, store, cache, "eager", grad=True, warm=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("grad", "warm"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("store", ["own", "int8"])
@pytest.mark.parametrize("name", TEXTS)
def test_every_format_stored_in_every_way_is_compiled_whole(name, store, kind, cache, grad, warm, backend):
    assert is_the_same(name, kind, store, cache, backend, grad=grad, warm=warm)


@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("change", ["step", "state"])
def test_what_is_compiled_answers_nothing_stale(change, cache, warm):
    layer, x = linear("svd", "own", cache)[1].eval(), KINDS["linear"][1]
    if warm:
        with torch.no_grad():
            layer(x)
    run = compiled(layer)
    with torch.no_grad():
        before = run(x)
        assert torch.equal(run(x), before)
    if change == "step":
        run(x).sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    else:
        layer.load_state_dict({name: 2 * held for name, held in layer.state_dict().items()})
    with torch.no_grad():
        assert not torch.equal(run(x), before)
        assert is_close(run(x), x @ layer.weight.T + layer.bias)


def test_a_size_that_changes_is_compiled_for_any_size():
    dense, layer = linear("svd", "int8")
    frozen(layer)
    run = compiled(layer)
    for n in (2, 3, 5, 9, 40, 300):
        assert is_close(run(numbers(n, 40)), dense(numbers(n, 40)).detach())


def test_a_compiled_layer_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert is_the_same("svd", "linear", "int8", "auto", "eager", grad=False, warm=True)
