"""Training through codes: the layer that learns is the one that its codes make, and gradients pass by the rounding."""

from __future__ import annotations

import pytest
import torch

from tcompress import load_task, make_method
from tcompress.encodings import INT3, INT4
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.runtime.install import collect
from tcompress.runtime.learning import Learning
from tcompress.training.coded import ThroughCodes, through_codes
from tcompress.training.factors import as_stored, let_learn
from tcompress.workflow.loading import load_into
from tests.training.tasks import MLP, factors

STORES = pytest.mark.parametrize("store", [torch.int8, INT4, INT3], ids=str)
SETTINGS = pytest.mark.parametrize("setting", [SVD(8), Sparse(0.3), LowRankSparse(rank=4, density=0.2)], ids=str)


@pytest.fixture
def learner(small, tmp_path):
    def made(setting, store):
        (tmp_path / "task.py").write_text(MLP)
        task = load_task(str(tmp_path / "task.py"), ("model", "train_batches"))
        model = task.model()
        load_into(model, small(setting, store))
        let_learn(model)
        return model, next(iter(task.train_batches()))[0]

    return made


def weights(model):
    return {name: layer.factors.reconstruct().detach().clone() for name, layer in collect(model).items()}


def learning(model):
    return [each for each in model.modules() if isinstance(each, Learning)]


def noise(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@STORES
@SETTINGS
def test_a_model_that_learns_through_codes_is_the_one_that_would_be_stored(setting, store, learner):
    model, inputs = learner(setting, store)
    with torch.no_grad():
        for each in learning(model):
            each.values += 0.3 * each.values.std() * noise(each.values.shape)
    assert through_codes(model, asked=True) is not None
    seen, outputs = weights(model), model(inputs)
    with as_stored(model):
        stored = weights(model)
        assert torch.allclose(model(inputs), outputs, rtol=1e-3, atol=1e-4)
    for name, weight in stored.items():
        torch.testing.assert_close(seen[name], weight, rtol=1e-4, atol=1e-5)


@STORES
def test_gradients_are_those_at_the_codes_and_reach_every_value(store, learner):
    (model, inputs), (plain, _) = learner(Sparse(0.3), store), learner(Sparse(0.3), store)
    pairs = list(zip(learning(model), learning(plain), strict=True))
    with torch.no_grad():
        for factor, _ in pairs:
            factor.values += 0.3 * factor.values.std() * noise(factor.values.shape)
        through_codes(model, asked=True)
        for factor, other in pairs:
            other.values.copy_(factor.at_places())
    for each in (model, plain):
        each(inputs).square().sum().backward()
    for factor, other in pairs:
        torch.testing.assert_close(factor.values.grad, other.values.grad)
        assert int(factor.values.grad.count_nonzero()) > 0.3 * factor.values.numel()


@STORES
def test_scales_follow_the_values_every_five_steps(store, learner):
    model, _ = learner(SVD(8), store)
    codes, factor = through_codes(model, asked=True), learning(model)[0]
    known, grown = factor.steps.clone(), []
    for step in range(6):
        factor.values.data *= 2
        codes.begin_step(step)
        grown.append(float((factor.steps / known).nanmedian()))
    assert grown == [2, 2, 2, 2, 2, 64]


@STORES
def test_what_is_stored_is_rounded_from_the_values_themselves(store, learner):
    model, _ = learner(Sparse(0.3), store)
    through_codes(model, asked=True)
    with as_stored(model):
        stored = weights(model)
    for each in learning(model):
        each.values.data *= 2
    with as_stored(model):
        for name, weight in weights(model).items():
            torch.testing.assert_close(weight, 2 * stored[name])


@STORES
def test_a_state_has_the_codes_that_factors_are_seen_as(store, learner):
    (model, _), (other, _) = learner(Sparse(0.3), store), learner(Sparse(0.3), store)
    for each in learning(model):
        each.values.data = each.values.sign() * each.values.abs().sqrt()
    for each in (model, other):
        through_codes(each, asked=True)
    other.load_state_dict(model.state_dict())
    seen = weights(model)
    assert all(torch.equal(weight, seen[name]) for name, weight in weights(other).items())


@STORES
def test_values_without_a_step_are_zeros(store, learner):
    model, _ = learner(SVD(8), store)
    for each in learning(model):
        each.values.data[:4] = 0  # 32 values and more: they have a scale to themselves
    through_codes(model, asked=True)
    assert not any(each.at_places()[:4].any() for each in learning(model))


def test_values_that_have_all_become_zero_are_no_codes(learner):
    model, _ = learner(Sparse(0.3), INT4)
    for each in learning(model):
        each.values.data.zero_()
    through_codes(model, asked=True)
    assert not any(weight.any() for weight in weights(model).values())


@pytest.mark.parametrize("method", ["finetune", "distill", "reconstruct"])
def test_every_step_of_a_method_is_told_to_the_codes(method, small, tune, fixtures, monkeypatch):
    told = []
    monkeypatch.setattr(ThroughCodes, "begin_step", lambda _, step: told.append(step))
    dense = fixtures / "digits_mlp.safetensors"
    tune(small(SVD(12), INT3), make_method(method), epochs=None, steps=3, against=dense)
    assert told == [0, 1, 2]


def test_nothing_is_coded_where_nobody_asks_or_nothing_is_stored_as_codes(learner):
    model, _ = learner(SVD(8), INT4)
    assert through_codes(model, asked=False) is None
    model, _ = learner(SVD(8), None)
    assert through_codes(model, asked=True) is None
    assert not any(name.endswith("steps") for name in model.state_dict())


@pytest.mark.parametrize("method", ["finetune", "distill:alpha=1", "reconstruct:end_to_end=1"])
def test_few_bits_are_worth_more_when_they_are_learnt_through(method, small, tune, fixtures):
    path, scores = small(SVD(12), INT3), {}
    for through in ("true", "false"):
        text = f"{method}:through_codes={through}"
        result = tune(path, make_method(text), epochs=12, force=True, against=fixtures / "digits_mlp.safetensors")
        scores[through] = max(row.scores["accuracy"] for row in result.rows)
    assert scores["true"] > scores["false"] + 0.02


@pytest.mark.parametrize("store", [torch.int8, INT4, INT3], ids=str)
def test_a_tuned_file_that_no_epoch_betters_is_written_as_it_was(store, small, tune):
    tuned = tune(small(Sparse(0.3), store), epochs=6, lr=2e-2)
    values = factors(tuned.output.path)
    again = tune(tuned.output.path, epochs=None, steps=1, lr=1e-30, out="again.safetensors")
    assert again.best_epoch == 0
    assert again.rows[0].scores == tuned.after.scores
    assert all(torch.equal(each, values[key]) for key, each in factors(again.output.path).items())
    assert again.output.path.read_bytes() == tuned.output.path.read_bytes()
