"""Sparse factors that learn: gradients are those of the dense weight, whichever way is taken; the way is counted."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcompress.formats import pattern
from tcompress.formats.low_rank_plus_sparse import LowRankPlusSparse
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.pattern import Pattern
from tcompress.formats.sparse import Sparse
from tcompress.formats.sparse_product import SparseProduct
from tcompress.runtime.install import factorized
from tcompress.runtime.learning import Learning
from tcompress.runtime.packed import assemble, held_in
from tcompress.training.factors import let_learn

SETTINGS = [
    Sparse(density=0.05),
    Sparse(density=0.5, m=4),
    LowRankSparse(rank=4, density=0.05),
    LowRankSparse(rank=4, density=0.05, low_rank="tt"),
    LowRankSparse(rank=0, density=0.1),
    LowRankSparse(rank=4, density=0.05, reconstruction="masking"),
    SparseProduct(nonzeros=3, count=3),
]
SIZES = (40, 24)  # outputs, inputs


def learning(setting):
    """Return a layer that learns, fitted to a dense one."""
    torch.manual_seed(0)
    dense = nn.Linear(SIZES[1], SIZES[0])
    fitted = setting.fit(dense.weight.detach())
    held = {name: nn.Parameter(f.detach()) for name, f in fitted.state_dict().items()}
    factors = assemble(setting, tuple(dense.weight.shape), held, torch.float32)
    model = nn.Sequential(factorized(dense, factors, setting, like=dense.weight, cache="auto", origin=None)).train()
    let_learn(model)
    return model


def gradients(model, x, autocast=False):
    """Return the answer, and what a step has: the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = model(x)
    (answer.float() * torch.linspace(-1, 1, answer.shape[-1])).square().sum().backward()
    return {"answer": answer.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def by_dense_weight(model, x):
    """Return the same by a weight that is put together and differentiated as a whole."""
    layer, x = model[0], x.clone().requires_grad_()
    factors = {}
    for name, held in held_in(layer.factors).items():
        factors[name] = held
        if isinstance(held, Learning):
            flat = torch.zeros(held.shape).reshape(-1)
            factors[name] = held.values if held.places is None else flat.index_put((held.places,), held.values)
            factors[name] = factors[name].reshape(held.shape)
    plain = layer.setting.load(layer.factors.shape, {name: f.detach() for name, f in factors.items()})
    weight = torch.func.functional_call(plain, factors, ("reconstruct",))
    model.zero_grad()
    answer = F.linear(x, weight, layer.bias)
    (answer * torch.linspace(-1, 1, answer.shape[-1])).square().sum().backward()
    return {"answer": answer.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


def drawn(setting, size):
    """Return a layer that learns, square, with random values at random places."""
    torch.manual_seed(0)
    dense, held = nn.Linear(size, size), {}
    for name, spec in setting.factor_specs((size, size), torch.float32).items():
        values = torch.randn(spec.shape) / size**0.5
        if spec.nonzeros is not None:
            values = torch.where(torch.rand(spec.shape) < spec.nonzeros / spec.values, values, 0)
        held[name] = nn.Parameter(values)
    factors = assemble(setting, (size, size), held, torch.float32)
    model = nn.Sequential(factorized(dense, factors, setting, like=dense.weight, cache="auto", origin=None)).train()
    let_learn(model)
    return model


@pytest.fixture
def taken(monkeypatch):
    """Note the products with compressed rows."""
    found, plain = [], Pattern.linear
    monkeypatch.setattr(Pattern, "linear", lambda self, x, values: found.append(self) or plain(self, x, values))
    return found


@pytest.fixture
def forced(monkeypatch, taken):
    """Let compressed rows cost nothing, or everything."""

    def force(way):
        cost = {"rows": -1e12, "dense": float("inf")}[way]
        monkeypatch.setattr(pattern, "learning_rows_effort", lambda *_: cost)
        return taken

    return force


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("way", ["rows", "dense"])
@pytest.mark.parametrize("shape", [(300,), (3, 7), ()], ids=str)
def test_gradients_are_those_of_the_dense_weight(setting, way, shape, forced):
    model, x = learning(setting), torch.randn(*shape, SIZES[1])
    taken = forced(way)
    found, expected = gradients(model, x), by_dense_weight(model, x)
    is_apart = way == "rows" and getattr(setting, "reconstruction", "additive") == "additive"
    assert bool(taken) == is_apart
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4), name


def test_gradients_in_float64_are_those_of_differences():
    values = torch.randn(9, dtype=torch.float64, requires_grad=True)
    places = Pattern(torch.tensor([0, 3, 7, 8, 12, 20, 21, 30, 34]), (7, 5))
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(places.linear, (x, values))


def test_the_same_step_has_the_same_bytes_and_more_rows_than_go_at_once(forced):
    model, x = learning(LowRankSparse(rank=4, density=0.1)), torch.randn(700, SIZES[1])
    forced("rows")
    first, second = gradients(model, x), gradients(copy.deepcopy(model), x)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_dense_weight_is_made_where_the_factors_are_cheaper(monkeypatch):
    model = drawn(LowRankSparse(rank=8, density=0.02), 512)
    expected = by_dense_weight(model, torch.ones(64, 512))
    monkeypatch.setattr(Pattern, "dense", lambda *_: pytest.fail("a dense weight was made"))
    found = gradients(model, torch.ones(64, 512))
    assert all(torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-3) for name in expected)


@pytest.mark.parametrize(
    ("setting", "n", "size", "is_taken"),
    [
        (Sparse(density=0.05), 128, 512, True),
        (Sparse(density=0.3), 128, 512, False),
        (Sparse(density=0.1), 128, 64, False),  # so small that what goes before a product takes longer
        (Sparse(density=0.1), 1024, 256, False),  # or that turning inputs round does
        (LowRankSparse(rank=16, density=0.05), 128, 512, True),
        (LowRankSparse(rank=16, density=0.3), 1024, 512, False),
        (SparseProduct(nonzeros=4, count=3), 128, 512, True),
        (SparseProduct(nonzeros=400, count=3), 4, 512, False),
    ],
    ids=str,
)
def test_the_way_is_chosen_by_what_it_costs(setting, n, size, is_taken, taken):
    model, x = drawn(setting, size), torch.randn(n, size)
    model(x)
    assert bool(taken) == is_taken
    taken.clear()
    with torch.autocast("cpu", torch.bfloat16):  # which has no product with compressed rows
        model(x)
    assert not taken


def test_a_step_in_bf16_has_the_gradients_of_bf16():
    for setting in (Sparse(density=0.05), LowRankSparse(rank=8, density=0.05)):
        model, x = drawn(setting, 256), torch.randn(64, 256)
        found, expected = gradients(model, x, autocast=True), by_dense_weight(model, x)
        for name, gradient in expected.items():
            assert found[name].dtype == (torch.bfloat16 if name == "answer" else torch.float32)
            assert (found[name] - gradient).norm() < 0.02 * gradient.norm(), name


def test_low_rank_and_sparse_parts_are_apart_for_few_inputs_and_one_weight_for_many(monkeypatch, taken):
    model, made = drawn(LowRankSparse(rank=64, density=0.5), 256), []
    plain = LowRankPlusSparse.reconstruct
    monkeypatch.setattr(LowRankPlusSparse, "reconstruct", lambda self: made.append(self) or plain(self))
    model(torch.randn(16, 256))
    assert (len(made), len(taken)) == (0, 0)
    model(torch.randn(4096, 256))
    assert (len(made), len(taken)) == (1, 0)


def test_a_second_derivative_is_refused():
    model, x = drawn(Sparse(density=0.05), 256), torch.randn(128, 256, requires_grad=True)
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_layers_that_learn_are_copied_pickled_and_moved():
    model, x = drawn(LowRankSparse(rank=4, density=0.05), 256), torch.randn(128, 256)
    expected = gradients(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        found = gradients(other, x)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_places_that_are_given_anew_are_used(forced):
    model = learning(Sparse(density=0.1))
    forced("rows")
    model(torch.ones(2, SIZES[1]))
    (factor,) = held_in(model[0].factors).values()
    factor.places = factor.places[1::2]
    factor.values = nn.Parameter(factor.values.detach()[1::2])
    x = torch.randn(5, SIZES[1])
    found, expected = gradients(model, x), by_dense_weight(model, x)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-4) for name in expected)


def test_nothing_at_all_and_no_values_are_answered(taken):
    empty = drawn(Sparse(density=0.05), 256)(torch.zeros(0, 256))
    assert empty.shape == (0, 256)
    assert not taken
    layer = drawn(Sparse(density=0.0), 64)
    found = gradients(layer, torch.randn(3, 64))
    assert torch.equal(found["answer"], layer[0].bias.expand(3, 64))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_step_is_the_same():
    model, x = learning(LowRankSparse(rank=4, density=0.05)), torch.randn(300, SIZES[1])
    expected = gradients(model, x)
    torch.compiler.reset()
    found = gradients(torch.compile(model, backend="eager", fullgraph=True), x)
    for name, gradient in expected.items():
        compiled = name if name in found else f"_orig_mod.{name}"
        assert torch.allclose(found[compiled], gradient, rtol=1e-4, atol=1e-4), name
