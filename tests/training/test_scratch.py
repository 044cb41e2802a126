"""from-scratch: weights of the usual size in every format, nothing of the trained model, and it learns."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tcompress as package
from tcompress import compress, load_into, plan_for, verify
from tcompress.checkpoint.manifest import read_manifest
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.encodings import INT3, INT4
from tcompress.errors import UsageError
from tcompress.formats import FORMATS, make
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.joint import Joint
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.ttm import TTMatrix
from tcompress.runtime.install import collect
from tcompress.runtime.packed import held_in
from tcompress.training.factors import as_stored, let_learn
from tcompress.training.objective import Setup
from tcompress.training.scratch import FromScratch, draw
from tcompress.workflow.settings import Settings
from tests.training.tasks import CNN, MLP, THREE

SIZES = {
    "sparse": {"density": 0.2},
    "low-rank-sparse": {"rank": 2, "density": 0.1},
    "sparse-product": {"nonzeros": 3},
}


@pytest.fixture
def scratch(from_dense):
    return from_dense(FromScratch, out="scratch.safetensors")


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.linear = nn.Embedding(60, 24), nn.Conv2d(16, 24, 3), nn.Linear(48, 36)


@pytest.fixture
def drawn(tmp_path):
    """Return a model of every kind of layer in one format, its factors drawn."""

    def call(setting, seed=0, store=None, trained=0):
        torch.manual_seed(trained)
        save_file(Three().state_dict(), tmp_path / "three.safetensors")
        dense, out = open_checkpoint(tmp_path / "three.safetensors"), tmp_path / "small.safetensors"
        compress(dense, plan_for(setting), out=out, force=True, settings=Settings(store=store))
        model = load_into(Three(), out)
        let_learn(model)
        draw(model, torch.Generator().manual_seed(seed))
        return model

    return call


def setting_of(name):
    kind = FORMATS[name]
    return make(kind, SIZES.get(name, {str(kind.rank_option): 3}))


@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not issubclass(kind, GroupFormat)])
def test_weights_of_every_format_have_the_mean_square_that_layers_begin_with(name, store, drawn):
    layers = collect(drawn(setting_of(name), store=store))
    assert layers
    for weight, layer in layers.items():
        wanted = 1.0 if weight == "table.weight" else 1 / (3 * math.prod(layer.factors.shape[1:]))
        assert float(layer.factors.reconstruct().detach().square().mean()) == pytest.approx(wanted, rel=1e-4), weight
        values = [each.detach() for each in layer.factors.parameters() if each.numel() > 100]
        for each in values:
            assert float(each.std()) == pytest.approx(float(values[0].std()), rel=0.3), "factors are of one size"


@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if not issubclass(kind, GroupFormat)])
def test_no_factor_of_any_format_tells_of_the_weights_that_it_was_fitted_to(name, drawn):
    one, two = (collect(drawn(setting_of(name), trained=trained)) for trained in (0, 1))
    assert one
    assert one.keys() == two.keys()
    for weight, layer in one.items():
        first, second = (dict(each.factors.named_parameters()) for each in (layer, two[weight]))
        assert first.keys() == second.keys()
        assert all(torch.equal(values, second[factor]) for factor, values in first.items())
        assert torch.equal(layer.factors.reconstruct(), two[weight].factors.reconstruct())


@pytest.mark.parametrize("setting", [Sparse(density=0.2), Sparse(density=0.5, m=4), SVD(rank=3)], ids=str)
def test_another_seed_draws_other_values_and_places_and_the_same_seed_the_same(setting, drawn):
    first, again, other = (
        {name: layer.factors.reconstruct().detach() for name, layer in collect(drawn(setting, seed)).items()}
        for seed in (0, 0, 1)
    )
    for name, weight in first.items():
        assert torch.equal(weight, again[name])
        assert not torch.equal(weight != 0, other[name] != 0) or isinstance(setting, SVD)
        assert not torch.equal(weight, other[name])
        assert int((weight != 0).sum()) == int((other[name] != 0).sum())


def test_groups_of_m_stay_groups(drawn):
    model = drawn(Sparse(density=0.5, m=4), store=INT4)
    with as_stored(model):
        for layer in collect(model).values():
            matrix = layer.factors.reconstruct().reshape(len(layer.weight), -1, 4)
            assert int((matrix != 0).sum(dim=2).max()) <= 2


def test_layers_of_a_group_share_what_was_drawn(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weights = {f"{n}.weight": torch.randn(24, 24, generator=generator) for n in range(3)}
    save_file(weights, tmp_path / "three.safetensors")
    dense, out = open_checkpoint(tmp_path / "three.safetensors"), tmp_path / "small.safetensors"
    compress(dense, plan_for(Joint(rank=4)), out=out)
    model = load_into(nn.Sequential(*(nn.Linear(24, 24, bias=False) for _ in range(3))), out)
    before = {name: set(map(id, held_in(layer.factors).values())) for name, layer in collect(model).items()}
    shared = set.intersection(*before.values())
    assert shared
    let_learn(model)
    draw(model, generator)
    after = [set(map(id, held_in(layer.factors).values())) for layer in collect(model).values()]
    assert len(set.intersection(*after)) == len(shared)
    for layer in collect(model).values():
        assert float(layer.weight.detach().square().mean()) == pytest.approx(1 / 72, rel=1e-4)


def test_a_group_is_trained_as_one_also_where_its_trained_weights_are_better_apart(scratch, tmp_path):
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(24, 1, generator=generator), torch.randn(1, 24, generator=generator)) for _ in range(3)]
    save_file({f"{n}.weight": left @ right for n, (left, right) in enumerate(pairs)}, tmp_path / "own.safetensors")
    dense, plan = open_checkpoint(tmp_path / "own.safetensors"), plan_for(Joint(ranks=(2, 3, 3)))
    apart = compress(dense, plan, out=tmp_path / "apart.safetensors").layers[0]
    assert apart.reason.startswith("3 layers are better apart")
    result = scratch(plan, text=THREE, source=tmp_path / "own.safetensors", epochs=1)
    assert not [note for note in result.notes if "dense" in note]
    assert set(read_manifest(open_checkpoint(result.output.path)).layers) == {f"{n}.weight" for n in range(3)}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("setting", [SVD(rank=4), TTMatrix(rank=4), Sparse(density=0.2)], ids=str)
def test_it_learns_and_what_is_written_verifies(setting, scratch):
    result = scratch(setting, epochs=15, lr=2e-2)
    assert result.after.scores["accuracy"] > 0.6
    assert result.rows[0].scores["accuracy"] < 0.3
    assert not result.rows[0].best
    assert verify(open_checkpoint(result.output.path)).problems == ()


@pytest.mark.parametrize("setting", [SVD(rank=4), Sparse(density=0.2)], ids=str)
def test_nothing_of_the_trained_weights_is_left(setting, scratch, fixtures, tmp_path):
    trained = load_file(fixtures / "digits_mlp.safetensors")
    generator = torch.Generator().manual_seed(7)
    others = {name: torch.randn(each.shape, generator=generator) for name, each in trained.items()}
    save_file(others, tmp_path / "others.safetensors")
    one = scratch(setting, out="one.safetensors").output.path
    two = scratch(setting, out="two.safetensors", source=tmp_path / "others.safetensors").output.path
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_statistics_and_normalisations_begin_anew(scratch, fixtures):
    result = scratch(SVD(rank=4), text=CNN, source=fixtures / "digits_cnn.safetensors", lr=1e-30, epochs=1)
    trained, written = load_file(fixtures / "digits_cnn.safetensors"), load_file(result.output.path)
    assert torch.allclose(written["bn1.weight"], torch.ones_like(written["bn1.weight"]))
    assert not torch.equal(written["bn1.running_mean"], trained["bn1.running_mean"])


@pytest.mark.parametrize("setting", [SVD(rank=3), Sparse(density=0.2)], ids=str)
def test_in_the_second_half_of_the_steps_what_learns_is_what_would_be_stored(setting, drawn):
    distances = []
    for asked in (True, False):
        model = drawn(setting, store=INT3)
        objective = FromScratch(through_codes=asked).objective(Setup(None, model, None, epochs=1, seed=0))
        for step in (0, 3, 4, 6):
            objective.begin_step(step, 7)
            learning = [layer.factors.reconstruct().detach().clone() for layer in collect(model).values()]
            with as_stored(model):
                stored = [layer.factors.reconstruct().detach().clone() for layer in collect(model).values()]
            distances.append(max(float((a - b).norm() / b.norm()) for a, b in zip(learning, stored, strict=True)))
    assert min(distances[:2] + distances[4:]) > 0.05
    assert distances[2:4] == pytest.approx([0, 0], abs=1e-4)


@pytest.mark.parametrize("store", [torch.int8, INT3], ids=str)
def test_a_stopped_run_goes_on_to_the_same_bytes(store, scratch, monkeypatch):
    whole = scratch(Sparse(density=0.2), out="whole.safetensors", store=store).output
    text = MLP + "\nimport os\nplain, calls = loss, 0\ndef loss(model, batch):\n    global calls\n    calls += 1\n"
    text += "    if calls == int(os.environ.get('DIE_AT', '0')):\n        raise KeyboardInterrupt\n"
    text += "    return plain(model, batch)\n"
    for die_at in (4, 6, 8):  # of ten steps
        monkeypatch.setenv("DIE_AT", str(die_at))
        with pytest.raises(KeyboardInterrupt):
            scratch(Sparse(density=0.2), text=text, save_every=1e-9, store=store)
        monkeypatch.setenv("DIE_AT", "0")
        result = scratch(Sparse(density=0.2), text=text, save_every=1e-9, store=store)
        assert f"went on from step {die_at - 1} of a run that was stopped" in result.notes
        assert result.output.sha256 == whole.sha256
        result.output.path.unlink()


def test_what_would_keep_trained_values_is_refused(scratch, tmp_path):
    text = MLP.replace(
        "return DigitsMLP()", "made = DigitsMLP()\n    made.input.requires_grad_(False)\n    return made"
    )
    with pytest.raises(UsageError, match=r"tensor input.weight: does not learn .* leave it out with --exclude"):
        scratch(SVD(rank=4), text=text, store=torch.int8)
    assert {each.name for each in tmp_path.iterdir()} <= {"task.py", "__pycache__"}
    text = MLP.replace(
        "return DigitsMLP()",
        "made = DigitsMLP()\n"
        "    made.input.__class__ = type('Own', (torch.nn.Linear,), {'forward': lambda self, x: x @ self.weight.T})\n"
        "    return made",
    )
    with pytest.raises(UsageError, match=r"tensor input.weight: is compressed, and stays dense in this model"):
        scratch(SVD(rank=4), text=text)


def test_there_is_one_way_to_begin():
    with pytest.raises(UsageError, match="--method from-scratch: init is one of random, got 'zeros'"):
        package.make_method("from-scratch:init=zeros")
