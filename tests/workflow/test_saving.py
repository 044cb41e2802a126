"""save_compressed: what was loaded is written again bit by bit, what was trained has no error that is known."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tcompress as package
from fixtures.models import DigitsCNN, DigitsMLP, DigitsTiedMLP
from tcompress import collect, load_into, save_compressed, verify
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.encodings import INT4
from tcompress.errors import NumericalError, OutputError, UsageError
from tcompress.formats.joint import Joint
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.runtime.packed import Packed
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import plan_for
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS

STORES = [None, torch.bfloat16, torch.int8, INT4]
NETWORKS = {
    "digits_cnn.safetensors": DigitsCNN,
    "digits_mlp_tied.pt": DigitsTiedMLP,
}


def shrunk(source, folder, plan=None, **settings):
    out = folder / "small.safetensors"
    package.compress(open_checkpoint(source), plan or plan_for(SVD(rank=4)), out=out, settings=Settings(**settings))
    return out


def contents(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint}


def same_tensors(one, two):
    first, second = contents(one), contents(two)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def manifest_of(path):
    return view(open_checkpoint(path)).manifest


def trained(model, images=None):
    """One step over everything that learns."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(torch.rand(4, 1, 8, 8) if images is None else images).square().sum().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("setting", [SVD(rank=4), Sparse(density=0.1), LowRankSparse(rank=2, density=0.1)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_model_is_written_as_it_was_read(name, setting, store, fixtures, tmp_path):
    path, out = shrunk(fixtures / name, tmp_path, plan_for(setting), store=store), tmp_path / "again.safetensors"
    model = load_into(NETWORKS[name](), path)
    result = save_compressed(model, out)
    assert result.nbytes == out.stat().st_size
    assert verify(open_checkpoint(out)).problems == ()
    assert verify(open_checkpoint(out), against=open_checkpoint(fixtures / name)).problems == ()
    assert same_tensors(path, out)
    before, after = manifest_of(path), manifest_of(out)
    assert after.layers == before.layers
    assert (after.tied, after.source, after.rebuild) == (before.tied, before.source, before.rebuild)


@pytest.mark.parametrize("store", STORES, ids=str)
def test_a_bf16_file_is_written_again_by_a_bf16_model(store, fixtures, tmp_path):
    source, out = fixtures / "digits_mlp_bf16.safetensors", tmp_path / "again.safetensors"
    path = shrunk(source, tmp_path, store=store)
    save_compressed(load_into(DigitsMLP().to(torch.bfloat16), path), out)
    assert same_tensors(path, out)
    assert verify(open_checkpoint(out), against=open_checkpoint(source)).problems == ()


@pytest.mark.parametrize("store", STORES, ids=str)
def test_a_model_that_was_cast_or_used_keeps_what_codes_say(store, fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp.safetensors", tmp_path, store=store)
    model = load_into(DigitsMLP(), path)
    for cast in (torch.double, torch.float32):
        model.to(cast)
        with torch.no_grad():
            model(torch.rand(2, 64).to(cast))
    save_compressed(model, tmp_path / "again.safetensors")
    # Factors in bfloat16 are float32 after the cast, and hold the same numbers.
    before, after = contents(path), contents(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(held.to(after[name].dtype), after[name]) for name, held in before.items())
    assert (
        store not in {torch.int8, INT4}
        or manifest_of(path).layers == manifest_of(tmp_path / "again.safetensors").layers
    )


def test_only_trained_layers_lose_their_error_and_every_command_can_show_that(fixtures, tmp_path, tcompress):
    source, out = fixtures / "digits_cnn.safetensors", tmp_path / "trained.safetensors"
    path = shrunk(source, tmp_path)
    model = load_into(DigitsCNN(), path)
    for layer in (model.pointwise, model.depthwise):
        layer.requires_grad_(False)
    save_compressed(trained(model), out)
    before, after = manifest_of(path).layers, manifest_of(out).layers
    unknown = {name for name, entry in after.items() if entry.relative_error is None}
    assert unknown == {"conv2.weight", "fc.weight"}
    assert all(after[name] == entry for name, entry in before.items() if name not in unknown)
    result = verify(open_checkpoint(out))
    assert result.problems == ()
    assert {layer.name for layer in result.layers if layer.reported_error is None} == unknown
    rows = {row.name: row for row in package.inspect(open_checkpoint(out)).rows}
    assert rows["fc.weight"].format is not None
    assert rows["fc.weight"].relative_error is None
    for command in ("inspect", "verify"):
        for options in ((), ("--json",)):
            answer = tcompress(command, out, *options)
            assert (answer.code, answer.err) == (0, "")
            assert command == "verify" or "fc.weight" in answer.out
    again = load_into(DigitsCNN(), out)
    assert again.fc.origin.relative_error is None
    save_compressed(again, tmp_path / "third.safetensors")
    assert manifest_of(tmp_path / "third.safetensors").layers == after
    assert same_tensors(out, tmp_path / "third.safetensors")


@pytest.mark.parametrize("store", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [SVD(rank=4), Sparse(density=0.1)], ids=str)
def test_errors_are_measured_against_the_original(setting, store, fixtures, tmp_path):
    source, out = fixtures / "digits_mlp.safetensors", tmp_path / "trained.safetensors"
    path = shrunk(source, tmp_path, plan_for(setting), store=store)
    model = load_into(DigitsMLP(), path)
    for name, held in model.named_parameters():
        held.requires_grad_(".bias" not in name)
    save_compressed(trained(model), out, against=open_checkpoint(source))
    result = verify(open_checkpoint(out), against=open_checkpoint(source))
    assert result.problems == ()
    before, after = manifest_of(path).layers, manifest_of(out).layers
    assert all(entry.relative_error is not None for entry in after.values())
    assert all(after[name].relative_error != entry.relative_error for name, entry in before.items())


def test_errors_of_a_cast_model_are_those_that_the_file_gives(fixtures, tmp_path):
    source, out = fixtures / "digits_mlp.safetensors", tmp_path / "cast.safetensors"
    model = load_into(DigitsMLP(), shrunk(source, tmp_path, plan_for(SVD(rank=60), include=["hidden.weight"])))
    model.hidden.factors.to(torch.bfloat16)
    model.hidden.like = model.hidden.like.to(torch.bfloat16)
    save_compressed(model, out, against=open_checkpoint(source))
    assert {held.dtype for name, held in contents(out).items() if ".weight." in name} == {torch.bfloat16}
    assert verify(open_checkpoint(out), against=open_checkpoint(source)).problems == ()


@pytest.fixture
def family(tmp_path):
    """Layers that share their factors."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(48, 4, generator=generator), torch.randn(4, 40, generator=generator)
    weights = {f"{n}.weight": left @ torch.randn(4, 4, generator=generator) @ right for n in range(6)}
    torch.save(weights, tmp_path / "family.pt")
    return tmp_path / "family.pt"


def siblings():
    return nn.Sequential(*(nn.Linear(40, 48, bias=False) for _ in range(6)))


class Parallel(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


@pytest.mark.parametrize("store", STORES, ids=str)
@pytest.mark.parametrize("method", ["shared-basis", "svd"])
def test_groups_stay_groups(method, store, family, tmp_path):
    methods = {} if method == "shared-basis" else {"method": "svd"}
    path = shrunk(family, tmp_path, plan_for(Joint(rank=4, **methods)), store=store)
    assert manifest_of(path).shared
    model, out = load_into(siblings(), path), tmp_path / "again.safetensors"
    save_compressed(model, out)
    assert same_tensors(path, out)
    assert manifest_of(out).layers == manifest_of(path).layers
    assert manifest_of(out).shared == manifest_of(path).shared
    assert verify(open_checkpoint(out), against=open_checkpoint(family)).problems == ()


def test_a_trained_group_is_written_with_what_it_shares_once(family, tmp_path):
    path = shrunk(family, tmp_path, plan_for(Joint(rank=4)))
    model, out = load_into(siblings(), path), tmp_path / "again.safetensors"
    trained(Parallel(model), torch.randn(3, 40))
    save_compressed(model, out, against=open_checkpoint(family))
    assert verify(open_checkpoint(out), against=open_checkpoint(family)).problems == ()
    again = load_into(siblings(), out)
    assert all(torch.equal(one.weight, two.weight) for one, two in zip(model, again, strict=True))


def test_a_group_whose_shared_factors_were_parted_is_not_written_as_one(family, tmp_path):
    model = load_into(siblings(), shrunk(family, tmp_path, plan_for(Joint(rank=4))))
    core = model[3].factors.core
    model[3].factors.core = nn.Parameter(core.detach() + 1)
    with pytest.raises(UsageError, match=r"3.weight: its factor core is no longer the one that it shares"):
        save_compressed(model, tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


@pytest.mark.parametrize("setting", [SVD(rank=4), Sparse(density=0.1)], ids=str)
def test_ties_stay_ties_after_training(setting, fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp_tied.pt", tmp_path, plan_for(setting))
    model, out = trained(load_into(DigitsTiedMLP(), path)), tmp_path / "again.safetensors"
    save_compressed(model, out)
    assert manifest_of(out).tied == {"hidden2.weight": "hidden1.weight", "hidden2.bias": "hidden1.bias"}
    assert not any(name.startswith("hidden2") for name in contents(out))
    again = load_into(DigitsTiedMLP(), out).eval()
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("store", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("setting", [SVD(rank=4), Sparse(density=0.1)], ids=str)
def test_factors_that_are_not_finite_are_not_written(setting, store, value, fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp.safetensors", tmp_path, plan_for(setting), store=store)
    model = load_into(DigitsMLP(), path)
    with torch.no_grad():
        next(model.hidden.factors.parameters()).view(-1)[0] = value
    with pytest.raises(NumericalError, match=r"hidden.weight: its factor \w+ is not finite"):
        save_compressed(model, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_file_that_exists_is_replaced_only_by_force(fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp.safetensors", tmp_path)
    model = load_into(DigitsMLP(), path)
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"out\.safetensors"):
        save_compressed(model, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"
    save_compressed(model, str(tmp_path / "out.safetensors"), force=True)
    save_compressed(model, path, force=True)  # the file it came from: nothing of it is needed any more
    assert same_tensors(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["out.pt", "out", "out.safetensors.bak"])
def test_another_suffix_is_refused(name, fixtures, tmp_path):
    model = load_into(DigitsMLP(), shrunk(fixtures / "digits_mlp.safetensors", tmp_path))
    with pytest.raises(UsageError, match=r"end the name with \.safetensors"):
        save_compressed(model, tmp_path / name)


def test_a_model_without_factorised_layers_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no factorised layers; load_into\(\) makes them"):
        save_compressed(DigitsMLP(), tmp_path / "out.safetensors")


def test_a_single_layer_is_written_under_the_names_of_its_own(tmp_path):
    torch.save(nn.Linear(20, 24).state_dict(), tmp_path / "one.pt")
    path = shrunk(tmp_path / "one.pt", tmp_path, plan_for(SVD(rank=3)), store=torch.int8)
    model = load_into(nn.Linear(20, 24), path)
    assert all(isinstance(held, Packed) for held in (model.factors.left, model.factors.right))
    save_compressed(model, tmp_path / "out.safetensors")
    assert same_tensors(path, tmp_path / "out.safetensors")
    assert set(collect(load_into(nn.Linear(20, 24), tmp_path / "out.safetensors"))) == {"weight"}


TASK = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 16))

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    return [torch.randn(32, 12, generator=random) + 1 for _ in range(8)]
"""


@pytest.mark.parametrize("prefix", ["", "module."])
def test_tensors_that_were_repaired_are_still_said_to_be(prefix, tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    task = load_task(str(tmp_path / "task.py"), NEEDS)
    torch.manual_seed(0)
    source, small, out = (tmp_path / f"{name}.safetensors" for name in ("model", "small", "again"))
    save_file({prefix + name: tensor for name, tensor in task.model().state_dict().items()}, source)
    with open_checkpoint(source) as checkpoint:
        models = Reconstruction(checkpoint, task, strip_prefix=prefix)
        package.compress(checkpoint, plan_for(SVD(rank=2)), out=small, reconstruction=models)
    repaired = manifest_of(small).repaired
    assert repaired
    model = load_into(task.model(), small, strip_prefix=prefix)
    save_compressed(model, out)
    assert manifest_of(out).repaired == tuple(name.removeprefix(prefix) for name in repaired)
    if not prefix:  # with one, the names are others than those of the source
        assert verify(open_checkpoint(out), against=open_checkpoint(source)).problems == ()
    for layer in (model[0], model[2]):
        layer.bias = None
    save_compressed(model, out, force=True)
    assert manifest_of(out).repaired == ()
