"""load_into and load_state_dict: layers take their places, ties and types stay, what does not fit is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import tcompress
from fixtures.models import DigitsCNN, DigitsMLP, DigitsTiedMLP, held_out_images
from tcompress import collect, load_into, load_state_dict
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.encodings import INT4
from tcompress.errors import InputError, SafetyError, UnsupportedError, UsageError
from tcompress.formats.joint import Joint
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.runtime.modules import Factorized, FactorizedConv, FactorizedEmbedding, FactorizedLinear
from tcompress.workflow.plan import Plan, Rule, plan_for
from tcompress.workflow.settings import Settings
from tests.hostile.corpus_compressed import part, put, small, whole

NETWORKS = {
    "digits_cnn.safetensors": DigitsCNN,
    "digits_cnn.pt": DigitsCNN,
    "digits_mlp.safetensors": DigitsMLP,
    "digits_mlp_bf16.safetensors": DigitsMLP,
    "digits_mlp_sharded": DigitsMLP,
    "digits_mlp_tied.pt": DigitsTiedMLP,
}
CACHES = ("auto", "always", "never")


def shrunk(source, folder, plan=None, **settings):
    """The compressed file, or folder, of a checkpoint."""
    out = folder / ("small" if source.is_dir() else "small.safetensors")
    tcompress.compress(open_checkpoint(source), plan or plan_for(SVD(rank=4)), out=out, settings=Settings(**settings))
    return out


def saved(tensors, folder, plan=None, **settings):
    path = folder / "model.pt"
    torch.save(tensors, path)
    return shrunk(path, folder, plan, **settings)


def decompressed(path, folder):
    out = folder / ("dense" if path.is_dir() else "dense.safetensors")
    tcompress.decompress(open_checkpoint(path), out=out)
    return {name: open_checkpoint(out).read(name) for name in open_checkpoint(out)}


def snapshot(model):
    """Every module and tensor of a model, and the values."""
    modules = [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)]
    tensors = {name: (id(held), held if held.is_meta else held.clone()) for name, held in all_tensors(model).items()}
    return modules, tensors


def all_tensors(model):
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def is_untouched(model, before):
    modules, tensors = snapshot(model)
    same = all(tensors[name][0] == held[0] for name, held in before[1].items())
    equal = all(held[1].is_meta or torch.equal(held[1], tensors[name][1]) for name, held in before[1].items())
    return modules == before[0] and tensors.keys() == before[1].keys() and same and equal


def refuses(model, source, *, match, error=InputError, **options):
    before = snapshot(model)
    with pytest.raises(error, match=match) as caught:
        load_into(model, source, **options)
    assert is_untouched(model, before)
    return str(caught.value)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_loaded_model_answers_as_the_decompressed_one(name, cache, device, fixtures, tmp_path):
    path = shrunk(fixtures / name, tmp_path)
    dense = NETWORKS[name]()
    dense.load_state_dict(decompressed(path, tmp_path))
    with torch.device(device):
        model = NETWORKS[name]()
    assert load_into(model, path, cache=cache) is model
    assert not any(held.is_meta for held in all_tensors(model).values())
    images = held_out_images()[0][:20]
    with torch.no_grad():
        expected, found = dense.eval()(images), model.eval()(images)
    if cache == "always":
        assert torch.equal(found, expected)
    # What the dense weight loses as bfloat16 the product of the factors does not.
    tolerance = 3e-2 if "bf16" in name else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_layers_are_replaced_by_their_kind(fixtures, tmp_path):
    model = load_into(DigitsCNN(), shrunk(fixtures / "digits_cnn.safetensors", tmp_path))
    layers = collect(model)
    assert {name: type(layer) for name, layer in layers.items()} == {
        "conv2.weight": FactorizedConv,
        "depthwise.weight": FactorizedConv,
        "pointwise.weight": FactorizedConv,
        "fc.weight": FactorizedLinear,
    }
    assert layers["fc.weight"] is model.fc
    assert "cache=auto" in repr(model)


class Block(nn.Module):
    """A layer of each kind, in one to three dimensions, beside what no factors can stand for."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(30, 16, padding_idx=3)
        self.line = nn.Conv1d(16, 12, 3, padding=1, padding_mode="circular")
        self.plane = nn.Conv2d(8, 12, (3, 2), padding="same", dilation=2, groups=2, bias=False)
        self.space = nn.Conv3d(4, 6, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), padding_mode="replicate")
        self.up = nn.ConvTranspose1d(12, 10, 3)
        self.lstm = nn.LSTM(10, 12)
        self.out = nn.Linear(12, 20)

    def forward(self, ids):
        x = self.line(self.embed_tokens(ids).transpose(1, 2))
        x = self.lstm(self.up(x).transpose(1, 2))[0]
        return self.out(x)


def test_layers_without_a_factorised_form_are_loaded_dense_and_named(tmp_path):
    source = Block().eval()
    path = saved(source.state_dict(), tmp_path)
    dense = Block().eval()
    dense.load_state_dict(decompressed(path, tmp_path))
    model = Block().eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_into(model, path, cache="always")
    told = sorted(str(warning.message).split(" ", 1)[0] for warning in caught)
    assert told == ["lstm.weight_hh_l0", "lstm.weight_ih_l0", "up.weight"]
    assert all(warning.filename == __file__ for warning in caught)
    ids = torch.tensor([[1, 3, 5, 29], [0, 2, 3, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids), dense(ids))
        for name, shape in (
            ("plane", (2, 8, 7, 6)),
            ("space", (2, 4, 3, 5, 4)),
            ("line", (16, 9)),
            ("plane", (8, 5, 5)),
        ):
            x = torch.randn(shape)
            assert torch.equal(getattr(model, name)(x), getattr(dense, name)(x)), name


class OwnForward(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.abs(), self.bias)


class Transposed(nn.Module):
    """As GPT-2 has its layers: (in, out)."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(16, 24)), nn.Parameter(torch.zeros(24))

    def forward(self, x):
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (lambda: OwnForward(16, 24), "OwnForward has a forward of its own"),
        (lambda: nn.Embedding(16, 24, max_norm=1.0), r"its rows are changed whenever they are used \(max_norm\)"),
        (lambda: nn.Embedding(16, 24, sparse=True), "its gradients are sparse"),
        (lambda: nn.ConvTranspose1d(16, 24, 3), "ConvTranspose1d is neither"),
        (Transposed, "Transposed is neither"),
        (lambda: nn.EmbeddingBag(16, 24), "EmbeddingBag is neither"),
        (lambda: nn.Bilinear(9, 9, 9), "Bilinear is neither"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_obstacle_is_told_and_the_values_are_those_of_decompression(layer, problem, device, tmp_path):
    path = saved(nn.Sequential(layer()).state_dict(), tmp_path, plan_for(SVD(rank=2)))
    with torch.device(device):
        model = nn.Sequential(layer())
    with pytest.warns(UserWarning, match=f"^0.weight is loaded dense: {problem}"):
        load_into(model, path)
    assert collect(model) == {}
    expected = decompressed(path, tmp_path)
    assert all(torch.equal(held, expected[name]) for name, held in model.state_dict().items())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_and_transformer_layers_work_in_training_and_on_the_fast_path(device, tmp_path):
    def build():
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2)

    path = saved(build().state_dict(), tmp_path, plan_for(SVD(rank=3)))
    dense = build()
    dense.load_state_dict(decompressed(path, tmp_path))
    with torch.device(device):
        model = build()
    with pytest.warns(UserWarning, match="in_proj_weight is loaded dense: in_proj_weight is no layer's weight"):
        load_into(model, path)
    assert isinstance(model.layers[0].self_attn.out_proj, FactorizedLinear)
    x = torch.randn(2, 5, 16)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), dense.train(mode)(x), rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
        with torch.inference_mode():
            torch.testing.assert_close(model(x), dense(x), rtol=1e-5, atol=1e-5)
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation gives."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = [result] if isinstance(result, torch.Tensor) else result if isinstance(result, tuple | list) else []
        on_cpu = [t.numel() for t in found if isinstance(t, torch.Tensor) and not t.is_meta]
        self.values = max(self.values, *on_cpu, 0)
        return result


@pytest.mark.parametrize("store", [None, torch.bfloat16, torch.int8, INT4], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_dense_weight_is_ever_made_on_the_way_through_factors(device, store, tmp_path):
    def build():
        return nn.Sequential(nn.Embedding(200, 150), nn.Linear(150, 200), nn.Flatten(), nn.Linear(200, 180, bias=False))

    path = saved(build().state_dict(), tmp_path, plan_for(SVD(rank=4)), store=store)
    with torch.device(device):
        model = build()
    with Largest() as largest:
        load_into(model, path, cache="never")
        with torch.no_grad():
            model(torch.tensor([[3], [5]]))
        model(torch.tensor([[3], [5]])).sum().backward()
    assert 800 <= largest.values <= 16_000  # of bytes, read as such; every weight has more values


def test_the_bias_of_a_meta_model_is_loaded_in_whatever_order_the_file_has(tmp_path):
    for names in (["weight", "bias"], ["bias", "weight"]):
        tensors = {f"fc.{name}": torch.randn(20, 16) if name == "weight" else torch.randn(20) for name in names}
        folder = tmp_path / names[0]
        folder.mkdir()
        path = saved(tensors, folder)
        with torch.device("meta"):
            model = nn.ModuleDict({"fc": nn.Linear(16, 20)})
        load_into(model, path)
        assert torch.equal(model["fc"].bias, tensors["fc.bias"])
        assert model["fc"](torch.randn(3, 16)).shape == (3, 20)


class TiedHead(nn.Module):
    """An embedding whose table is the last layer's weight."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed_tokens = nn.Embedding(40, 16)
        self.lm_head = nn.Linear(16, 40, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.embed_tokens(ids))


@pytest.mark.parametrize("names", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("store", [None, torch.int8], ids=str)
def test_a_tied_head_shares_the_factors_of_the_embedding(names, device, store, tmp_path):
    weight = torch.randn(40, 16)
    path = saved({f"{name}.weight": weight for name in names}, tmp_path, store=store)
    with torch.device(device):
        model = TiedHead()
    load_into(model, path)
    assert isinstance(model.embed_tokens, FactorizedEmbedding)
    assert isinstance(model.lm_head, FactorizedLinear)
    one, two = (all_tensors(layer.factors) for layer in (model.embed_tokens, model.lm_head))
    assert {name: id(held) for name, held in one.items()} == {name: id(held) for name, held in two.items()}
    assert torch.equal(model.embed_tokens.weight, decompressed(path, tmp_path)[f"{names[0]}.weight"])
    ids = torch.tensor([[1, 39, 0]])
    expected = F.embedding(ids, model.lm_head.weight) @ model.embed_tokens.weight.T
    torch.testing.assert_close(model(ids), expected)


@pytest.mark.parametrize("plan", [None, Plan(())], ids=["compressed", "dense"])
def test_two_tensors_for_one_tied_parameter_must_be_equal(plan, tmp_path):
    weight = torch.randn(40, 16)
    rules = (Rule("other.weight", SVD(rank=2)), *(Plan(()) if plan else plan_for(SVD(rank=4))).rules)
    tensors = {"embed_tokens.weight": weight, "lm_head.weight": weight.clone(), "other.weight": torch.randn(30, 30)}

    def build():
        model = TiedHead()
        model.other = nn.Linear(30, 30, bias=False)
        return model

    path = saved(tensors, tmp_path, Plan(rules))
    assert "lm_head.weight" in load_state_dict(path)
    model = load_into(build(), path)
    dense = decompressed(path, tmp_path)["lm_head.weight"]
    assert torch.equal(model.embed_tokens.weight, dense)
    (tmp_path / "b").mkdir()
    tensors["lm_head.weight"][2, 3] += 1
    path = saved(tensors, tmp_path / "b", Plan(rules))
    refuses(build(), path, match=r"lm_head.weight: differs from embed_tokens.weight, and the model has one tensor")


def test_what_is_tied_in_the_file_alone_stays_apart_in_the_model(fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp_tied.pt", tmp_path)

    class Untied(DigitsTiedMLP):
        def __init__(self):
            super().__init__()
            self.hidden2 = nn.Linear(128, 128)

    model = Untied()
    model.hidden2.weight.requires_grad_(False)
    load_into(model, path)
    assert torch.equal(model.hidden1.weight, model.hidden2.weight)
    assert not {id(p) for p in model.hidden1.parameters()} & {id(p) for p in model.hidden2.parameters()}
    assert all(parameter.requires_grad for parameter in model.hidden1.factors.parameters())
    assert not any(parameter.requires_grad for parameter in model.hidden2.factors.parameters())
    with torch.no_grad():
        next(model.hidden1.factors.parameters()).zero_()
    assert model.hidden2.weight.any()


def test_tied_modules_stay_tied_and_a_module_under_two_names_stays_one(fixtures, tmp_path):
    model = load_into(DigitsTiedMLP(), shrunk(fixtures / "digits_mlp_tied.pt", tmp_path))
    assert model.hidden1.factors.left is model.hidden2.factors.left
    assert model.hidden1.bias is model.hidden2.bias

    def build():
        one = nn.Linear(16, 16)
        return nn.Sequential(one, nn.ReLU(), one)

    (tmp_path / "b").mkdir()
    twice = load_into(build(), saved(build().state_dict(), tmp_path / "b"))
    assert twice[0] is twice[2]
    assert set(collect(twice)) == {"0.weight", "2.weight"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(16, 20), lambda: nn.Conv1d(16, 20, 3), lambda: nn.Embedding(20, 16)]
)
def test_a_model_that_is_one_layer_is_given_back_as_another(layer, device, tmp_path):
    path = saved(layer().state_dict(), tmp_path)
    with torch.device(device):
        model = layer()
    found = load_into(model, path)
    assert isinstance(found, Factorized)
    assert set(collect(found)) == {"weight"}
    expected = decompressed(path, tmp_path)
    assert torch.equal(found.weight, expected["weight"])
    assert found.bias is None or torch.equal(found.bias, expected["bias"])
    again = load_into(found, path)
    assert again is not found
    assert torch.equal(again.weight, expected["weight"])


@pytest.mark.parametrize("second", [SVD(rank=2), Sparse(density=0.2)], ids=str)
def test_loading_again_replaces_what_was_loaded(second, fixtures, tmp_path):
    source = fixtures / "digits_cnn.safetensors"
    model = load_into(DigitsCNN().eval(), shrunk(source, tmp_path))
    (tmp_path / "b").mkdir()
    path = shrunk(source, tmp_path / "b", plan_for(second))
    load_into(model, path, cache="always")
    fresh = load_into(DigitsCNN().eval(), path, cache="always")
    assert model.state_dict().keys() == fresh.state_dict().keys()
    images = held_out_images()[0][:4]
    with torch.no_grad():
        assert torch.equal(model(images), fresh(images))


def test_a_file_that_is_dense_where_the_model_has_factors_is_refused_before_anything_is_changed(fixtures, tmp_path):
    source = fixtures / "digits_mlp.safetensors"
    model = load_into(DigitsMLP(), shrunk(source, tmp_path))
    (tmp_path / "b").mkdir()
    path = shrunk(source, tmp_path / "b", plan_for(SVD(rank=2), exclude=["output.weight"]))
    refuses(model, path, match="output.weight is dense, and the model has a factorised layer there; build the model")


def test_prefixes_are_left_out_when_asked_and_found_when_not(tmp_path):
    inner = DigitsMLP()
    path = saved({f"module.{name}": held for name, held in inner.state_dict().items()}, tmp_path)
    for prefix in ("module.", "module"):
        assert len(collect(load_into(DigitsMLP(), path, strip_prefix=prefix))) == 3
        assert load_state_dict(path, strip_prefix=prefix).keys() == inner.state_dict().keys()
    refuses(DigitsMLP(), path, match=r"with strip_prefix='module.' names would fit")
    refuses(DigitsMLP(), path, match="does not begin with 'model.', which is to be left out", strip_prefix="model")
    (tmp_path / "b").mkdir()
    bare = saved(inner.state_dict(), tmp_path / "b")
    refuses(nn.ModuleDict({"net": DigitsMLP()}), bare, match="the file fits the model's part 'net'")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_everything_that_does_not_fit_stands_in_one_message(device, tmp_path):
    tensors = DigitsMLP().state_dict()
    del tensors["hidden.bias"], tensors["output.weight"]
    tensors |= {"input.weight": torch.randn(128, 65), "more.weight": torch.randn(9, 9), "output.bias": torch.zeros(11)}
    path = saved(tensors, tmp_path)
    with torch.device(device):
        model = DigitsMLP()
    message = refuses(model, path, match=r"does not fit the model DigitsMLP; ")
    assert "missing: hidden.bias, output.weight; unexpected: more.weight; of another shape: " in message
    assert "input.weight (128x65 in the file, 128x64 in the model)" in message
    assert "output.bias (11 in the file, 10 in the model)" in message


def test_another_architecture_is_refused(fixtures, tmp_path):
    message = refuses(DigitsMLP(), shrunk(fixtures / "digits_cnn.safetensors", tmp_path), match="does not fit")
    assert message.count("\n") == 0
    assert all(name in message for name in ("input.weight", "conv1.weight", "bn2.num_batches_tracked"))


def test_buffers_that_no_file_holds_must_not_be_on_meta(tmp_path):
    class Rotary(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.register_buffer("frequencies", torch.arange(4.0), persistent=False)

    path = saved(Rotary().state_dict(), tmp_path)
    assert torch.equal(load_into(Rotary(), path).frequencies, torch.arange(4.0))
    with torch.device("meta"):
        model = nn.ModuleDict({"fc": nn.Linear(16, 16)})
        rotary = Rotary()
    refuses(rotary, path, match="does not hold frequencies, which the model has on the meta device")
    assert not any(held.is_meta for held in all_tensors(load_into(model, path)).values())


def test_types_and_what_learns_are_those_of_the_model(fixtures, tmp_path):
    model = DigitsMLP().to(torch.bfloat16)
    model.hidden.weight.requires_grad_(False)
    model.eval()
    load_into(model, shrunk(fixtures / "digits_mlp.safetensors", tmp_path))
    assert all(layer.weight.dtype == torch.bfloat16 for layer in collect(model).values())
    assert model.input.bias.dtype == torch.bfloat16
    assert {held.dtype for held in model.input.factors.parameters()} == {torch.float32}
    assert not any(held.requires_grad for held in model.hidden.factors.parameters())
    assert all(held.requires_grad for held in model.input.factors.parameters())
    assert not model.hidden.training
    assert model(torch.randn(2, 64).to(torch.bfloat16)).dtype == torch.bfloat16


def test_the_factors_of_a_group_are_shared_between_its_layers(tmp_path):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(48, 4, generator=generator), torch.randn(4, 40, generator=generator)
    weights = {f"{n}.weight": left @ torch.randn(4, 4, generator=generator) @ right for n in range(6)}
    path = saved(weights, tmp_path, plan_for(Joint(rank=4)))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(40, 48, bias=False) for _ in range(6)))
    load_into(model, path)
    assert len({id(layer.factors.core) for layer in model}) == 1
    assert len({id(layer.factors.mix) for layer in model}) == 6
    expected = decompressed(path, tmp_path)
    assert all(torch.equal(layer.weight, expected[name]) for name, layer in collect(model).items())
    load_into(model, path)
    assert len({id(layer.factors.core) for layer in model}) == 1


@pytest.mark.parametrize("store", [None, torch.bfloat16, torch.int8, INT4], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_dense_tensors_are_those_of_decompression_bit_by_bit(name, store, fixtures, tmp_path):
    path = shrunk(fixtures / name, tmp_path, store=store)
    expected = decompressed(path, tmp_path)
    found = load_state_dict(path)
    assert found.keys() == expected.keys()
    assert all(held.dtype == expected[key].dtype and torch.equal(held, expected[key]) for key, held in found.items())
    with torch.device("meta"):
        model = NETWORKS[name]()
    into = load_state_dict(path, model)
    assert all(torch.equal(held, expected[key].to(held.dtype)) for key, held in model.state_dict().items())
    assert all(into[key].data_ptr() == held.data_ptr() for key, held in model.state_dict().items())


def test_dense_files_are_read_as_well(fixtures):
    found = load_state_dict(fixtures / "digits_mlp.safetensors", DigitsMLP())
    assert all(torch.equal(held, found[name]) for name, held in load_file(fixtures / "digits_mlp.safetensors").items())


def test_dense_tensors_do_not_go_into_factorised_layers(fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp.safetensors", tmp_path)
    model = load_into(DigitsMLP(), path)
    with pytest.raises(UsageError, match="the model has factorised layers"):
        load_state_dict(path, model)


def test_an_opened_checkpoint_stays_open(fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp.safetensors", tmp_path)
    with open_checkpoint(path) as checkpoint:
        load_into(DigitsMLP(), checkpoint)
        load_into(DigitsMLP(), checkpoint)
        load_state_dict(checkpoint)
    load_into(DigitsMLP(), str(path))


def test_a_cache_that_there_is_not_is_refused_first(tmp_path):
    refuses(
        DigitsMLP(),
        tmp_path / "no",
        match="cache is one of auto, always, never, got 'off'",
        error=UsageError,
        cache="off",
    )


def test_a_dense_file_is_no_compressed_checkpoint(fixtures):
    refuses(DigitsMLP(), fixtures / "digits_mlp.safetensors", match="is not a compressed checkpoint")


def test_every_flipped_byte_is_noticed_before_the_model_is_touched(tmp_path):
    path = saved({"weight": torch.randn(10, 8), "bias": torch.randn(10)}, tmp_path, plan_for(SVD(rank=1)))
    sound = path.read_bytes()
    model = nn.Linear(8, 10)
    before = snapshot(model)
    flipped = tmp_path / "flipped.safetensors"
    for place in [*range(0, len(sound), 7), *range(len(sound) - 40, len(sound))]:
        content = bytearray(sound)
        content[place] ^= 0x20
        flipped.write_bytes(content)
        with pytest.raises((InputError, SafetyError, UnsupportedError)):
            load_into(model, flipped)
    assert is_untouched(model, before)


def lone():
    return nn.ModuleDict({"fc": nn.Linear(20, 24)})


@pytest.mark.parametrize(
    ("encoding", "values", "change", "problem"),
    [
        ("csr", None, put("columns", 3, 20), "has column numbers outside 0 to 19"),
        ("csr", "int8", put("columns", -1, 65535), "has column numbers outside 0 to 19"),
        ("csr", None, put("row_starts", 3, (1 << 63) - 1), "row starts that do not rise"),
        ("bitmask", None, put("mask", 0, 0xFF), "has values of shape"),
        ("delta8", None, put("gaps", 5, 254), "reach beyond its last element"),
        ("2:4", None, part("patterns", lambda t: torch.full_like(t, 255)), "none of 2:4"),
        ("dense", "int8", put("scale", 3, float("nan")), "scales that are negative or"),
        ("dense", "int4", part("codes", lambda t: t[1:]), "has not the codes of"),
    ],
)
@pytest.mark.parametrize("call", [load_into, lambda model, path: load_state_dict(path, model)], ids=["into", "state"])
def test_factors_that_lie_under_true_hashes_are_refused(call, encoding, values, change, problem, tmp_path):
    path = small(change, encoding, values)(tmp_path)
    model = lone()
    before = snapshot(model)
    with pytest.raises(InputError, match=problem):
        call(model, path)
    if call is load_into:
        assert is_untouched(model, before)


def test_the_same_file_without_the_lie_is_loaded(tmp_path):
    for encoding in ("csr", "bitmask", "delta8", "2:4", "dense"):
        assert len(collect(load_into(lone(), small(None, encoding)(tmp_path)))) == 1


def test_a_format_of_a_later_version_is_named_with_its_writer(tmp_path):
    later = {"format": "svd2"}
    path = small(lambda document, _: document["layers"]["fc.weight"].update(later))(tmp_path)
    refuses(
        lone(), path, match="has format 'svd2', which this version does not know; w 1 wrote it", error=UnsupportedError
    )
    path = small(whole(version=2))(tmp_path)
    refuses(lone(), path, match="written by w 1", error=UnsupportedError)


def test_factors_that_do_not_make_the_shape_are_refused(tmp_path):
    def change(_, tensors):
        tensors["fc.weight.left"] = torch.ones(24, 4)

    refuses(lone(), small(change)(tmp_path), match="fc.weight")


def test_loading_leaves_no_tensor_in_the_file_and_draws_no_random_number(fixtures, tmp_path):
    path = shrunk(fixtures / "digits_mlp.safetensors", tmp_path)
    with torch.device("meta"):
        model = DigitsMLP()
    state = torch.random.get_rng_state()
    load_into(model, path)
    assert torch.equal(torch.random.get_rng_state(), state)
    before = {name: held.clone() for name, held in model.state_dict().items()}
    path.write_bytes(b"\0" * path.stat().st_size)
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())


def test_state_dicts_of_loaded_models_go_round(fixtures, tmp_path):
    path = shrunk(fixtures / "digits_cnn.safetensors", tmp_path, store=torch.int8)
    model, other = load_into(DigitsCNN().eval(), path), load_into(DigitsCNN().eval(), path)
    images = held_out_images()[0][:4]
    with torch.no_grad():
        for held in model.parameters():
            held.add_(0.01)
        other(images)
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        torch.save(model.state_dict(), tmp_path / "state.pt")
        third = load_into(DigitsCNN().eval(), path)
        third.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=True)
        assert torch.equal(other(images), model(images))
        assert torch.equal(third(images), model(images))
