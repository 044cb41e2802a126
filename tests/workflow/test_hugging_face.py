"""What compress writes into config.json, and that decompress leaves no trace of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats.svd import SVD
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decompression import decompress
from tcompress.workflow.hugging_face import MAX_CONFIG_BYTES
from tcompress.workflow.plan import plan_for

PLAN = plan_for(SVD(rank=4))
OTHER = "it has a quantization_config of its own"
NOTE = "config.json was copied as it is ({}): transformers will not find the compressed weights by it"


@pytest.fixture
def there_and_back(tmp_path):
    """Return the config.json of the compressed and of the decompressed folder, and the notes."""

    def run(text, **options):
        source = tmp_path / "source"
        source.mkdir()
        generator = torch.Generator().manual_seed(0)
        save_file({"a.weight": torch.randn(64, 64, generator=generator)}, source / "model.safetensors")
        (source / "config.json").write_bytes(text)
        with open_checkpoint(source) as checkpoint:
            result = compress(checkpoint, PLAN, out=tmp_path / "small", **options)
        with open_checkpoint(tmp_path / "small") as checkpoint:
            decompress(checkpoint, out=tmp_path / "dense")
        return (tmp_path / "small/config.json").read_bytes(), (tmp_path / "dense/config.json").read_bytes(), result

    return run


@pytest.mark.parametrize(
    "text",
    [
        b'{\n  "model_type": "bert",\n  "dtype": "float32"\n}\n',
        b'{"architectures": ["A"], "dtype": "float32"}',
        b'{\r\n\t"torch_dtype": "float16",\r\n\t"model_type": "\xc3\xa9 \\u00e9"\r\n}  \r\n',
        b'{"model_type": "mamba2", "limit": [Infinity], "a": 1e400, "b": {"quantization_config": 1}, "dtype": 1}\n',
    ],
)
def test_the_entry_is_added_at_the_end_and_taken_out_without_a_trace(there_and_back, text):
    small, dense, result = there_and_back(text)
    assert dense == text
    assert result.notes == ()
    entry = {"quant_method": "tcompress", "weights": "model.tcompress.safetensors"}
    assert list(json.loads(small).items()) == [*json.loads(text).items(), ("quantization_config", entry)]
    assert small.startswith(text.rstrip().removesuffix(b"}").rstrip())


def test_shards_are_named_by_their_index(there_and_back):
    small, dense, _ = there_and_back(b'{"model_type": "a", "dtype": "float32"}', max_shard_bytes=4096)
    assert json.loads(small)["quantization_config"]["weights"] in {
        "model.tcompress.safetensors",
        "model.tcompress.safetensors.index.json",
    }
    assert b"quantization_config" not in dense


def test_the_type_is_named_where_the_rest_says_nothing_of_it(there_and_back):
    small, dense, _ = there_and_back(b'{"model_type": "a", "torch_dtype": null}')
    assert json.loads(small)["quantization_config"]["dtype"] == "float32"
    assert dense == b'{"model_type": "a", "torch_dtype": null}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            b'{"model_type": "a", "quantization_config": {"quant_method": "gptq"}}',
            "it has a quantization_config of its own",
        ),
        (b'{"model_type": "a", "quantization_config": null}', OTHER),
        (b'{"model_type": ', "its JSON cannot be read"),
        (b"\xff\xfe\x00\x01", "its JSON cannot be read"),
        (b"[" * 100_000, "its JSON cannot be read"),
        (b'["model_type"]', "its JSON is not an object"),
        (b'{"model_type": "' + b"a" * MAX_CONFIG_BYTES + b'"}', f"it is larger than {MAX_CONFIG_BYTES} bytes"),
    ],
    ids=["other method", "null", "cut", "no text", "deep", "list", "large"],
)
def test_what_cannot_be_changed_is_copied_and_named(there_and_back, text, reason):
    small, dense, result = there_and_back(text)
    assert small == dense == text
    assert result.notes == (NOTE.format(reason),)


@pytest.mark.parametrize("text", [b"{}", b'{"_class_name": "UNet2DConditionModel"}'])
def test_the_config_of_another_library_stays_as_it_is(there_and_back, text):
    small, dense, result = there_and_back(text)
    assert small == dense == text
    assert result.notes == ()


def test_an_entry_that_somebody_wrote_anew_is_taken_out_too(there_and_back, tmp_path):
    there_and_back(b'{"model_type": "a"}')
    path = tmp_path / "small/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    with open_checkpoint(tmp_path / "small") as checkpoint:
        decompress(checkpoint, out=tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == {"model_type": "a"}


def test_a_dry_run_of_a_folder_knows_the_files_to_the_byte(there_and_back, tmp_path):
    _, _, result = there_and_back(b'{"model_type": "a"}')
    with open_checkpoint(tmp_path / "source") as checkpoint:
        assert dry_run(checkpoint, PLAN).stored_bytes == result.stored_bytes
