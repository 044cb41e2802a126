"""The manifest: what is written is read back, and whatever else stands there is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tcompress.checkpoint.dtypes import BY_NAME
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.manifest import (
    Entry,
    Factor,
    Manifest,
    compact_json,
    is_compressed,
    parse_manifest,
    read_manifest,
)
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.safetensors_file import OF_MANIFEST
from tcompress.errors import InputError, TcompressError, UnsupportedError

PATH = "small.safetensors"
ENTRY = Entry(
    format="svd",
    options={"rank": 2},
    kind=LayerKind.LINEAR,
    shape=(6, 4),
    dtype=BY_NAME["float32"],
    norm=2.5,
    relative_error=0.125,
    factors={"left": Factor("dense"), "right": Factor("csr", (2, 4))},
)
CONV = Entry(
    "sparse", {}, LayerKind.CONV, (6, 4, 3), BY_NAME["bfloat16"], 0, 0.0, {"matrix": Factor("bitmask", (6, 12))}
)
MANIFEST = Manifest(
    writer="tcompress 0.1",
    source={"sha256": "ab" * 32, "bytes": 500, "key": "state_dict"},
    tied={"head.weight": "fc.weight", "ä": "fc.bias"},
    rebuild={"svd": "(left @ right).reshape(shape)", "sparse": "matrix.reshape(shape)"},
    layers={"fc.weight": ENTRY, "conv.weight": CONV},
)


def parse(document):
    return parse_manifest(json.dumps(document), PATH)


def refusal(document, kind=InputError):
    with pytest.raises(InputError) as caught:
        parse(document)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{PATH}: ")
    return message.removeprefix(f"{PATH}: ")


def with_entry(**changed):
    document = MANIFEST.to_json()
    document["layers"]["fc.weight"].update(changed)
    return document


def test_a_manifest_is_read_back_as_it_was_written():
    assert parse_manifest(compact_json(MANIFEST.to_json()), PATH) == MANIFEST
    assert parse(Manifest(writer="w").to_json()) == Manifest(writer="w")


def test_the_document_is_that_of_format_md():
    assert json.loads(compact_json(MANIFEST.to_json()))["layers"]["fc.weight"] == {
        "format": "svd",
        "options": {"rank": 2},
        "kind": "linear",
        "shape": [6, 4],
        "dtype": "float32",
        "norm": 2.5,
        "relative_error": 0.125,
        "factors": {"left": "dense", "right": {"encoding": "csr", "shape": [2, 4]}},
    }


def test_the_json_is_compact_sorted_and_plain():
    assert compact_json({"b": "ä", "a": [1, 2.5]}) == '{"a":[1,2.5],"b":"\\u00e4"}'


def test_keys_that_a_later_version_may_add_are_passed_over():
    assert parse({**with_entry(note="x"), "hashes": {}, "more": [1]}) == MANIFEST


def test_repaired_tensors_are_named_and_go_with_their_shard(tmp_path):
    whole = replace(MANIFEST, repaired=("conv.bias", "fc.bias"))
    assert parse_manifest(compact_json(whole.to_json()), PATH) == whole
    assert "repaired" not in MANIFEST.to_json()
    parts = [whole.only(["fc.weight", "fc.bias"]), whole.only(["conv.weight", "conv.bias"])]
    assert [part.repaired for part in parts] == [("fc.bias",), ("conv.bias",)]
    with sharded(tmp_path, *parts) as checkpoint:
        assert read_manifest(checkpoint) == whole


@pytest.mark.parametrize("names", [None, "fc.bias", {"fc.bias": 1}, [7], [None]])
def test_names_of_repaired_tensors_are_text(names):
    problem = "its tcompress manifest names repaired tensors with something that is no text"
    assert refusal({**MANIFEST.to_json(), "repaired": names}) == problem


@pytest.mark.parametrize("names", [["fc.bias", "fc.bias"], ["fc.weight"]])
def test_a_tensor_is_repaired_once_and_not_compressed(names):
    problem = "its tcompress manifest names repaired tensors twice, or such as are compressed"
    assert refusal({**MANIFEST.to_json(), "repaired": names}) == problem


def test_a_newer_version_names_its_writer():
    problem = "was written by tcompress 9.9 as version 2; this tcompress reads up to version 1, a newer one is needed"
    assert refusal({"version": 2, "writer": "tcompress 9.9"}, UnsupportedError) == problem
    assert refusal({"version": 2}, UnsupportedError).startswith("was written by a newer tcompress as version 2; ")
    assert refusal({"version": 2, "writer": "a\n\x1b[2J"}, UnsupportedError).startswith(
        "was written by a\\n\\x1b[2J as "
    )


@pytest.mark.parametrize("version", [None, "1", 1.0, True, 0, -1, [1], {}])
def test_a_version_that_is_no_positive_integer_is_refused(version):
    assert refusal({**MANIFEST.to_json(), "version": version}) == "its tcompress manifest has no version"


@pytest.mark.parametrize("key", ["writer", "source", "tied", "rebuild", "layers"])
@pytest.mark.parametrize("value", [None, 7, [], "missing"])
def test_what_every_manifest_has_must_be_there(key, value):
    document = {**MANIFEST.to_json(), key: value}
    if value == "missing":
        del document[key]
    assert refusal(document) == "its tcompress manifest lacks writer, source, tied, rebuild or layers"


@pytest.mark.parametrize("value", [None, 5, [], {}, True])
@pytest.mark.parametrize("key", ["tied", "rebuild"])
def test_ties_and_formulas_are_text(key, value):
    document = {**MANIFEST.to_json(), "tied": {"a": "b"}, "rebuild": {"a": "b"}}
    document[key] = {"a": value}
    problem = "tensor a: its tcompress manifest ties or rebuilds it with something that is no text"
    assert refusal(document) == problem


def test_a_key_nested_deeper_than_any_checkpoint_is_refused():
    document = {**MANIFEST.to_json(), "source": {"key": "a." * 49 + "a"}}
    assert parse(document).source == document["source"]
    document["source"]["key"] += ".a"
    assert refusal(document) == "its tcompress manifest has a key nested deeper than 50"


@pytest.mark.parametrize(
    "changed",
    [
        {"format": None},
        {"format": ["svd"]},
        {"options": []},
        {"kind": "pool"},
        {"kind": None},
        {"shape": None},
        {"shape": "64"},
        {"shape": 24},
        {"shape": [6, -4]},
        {"shape": [6, 4.0]},
        {"shape": [6, True]},
        {"shape": [6, "4"]},
        {"shape": [1] * 65},
        {"shape": [2**32, 2**31]},
        {"shape": [0, 2**63]},
        {"shape": [10**4000]},
        {"dtype": "float33"},
        {"dtype": 32},
        {"dtype": []},
        {"norm": None},
        {"norm": "2.5"},
        {"norm": True},
        {"norm": -1.0},
        {"norm": 10**400},
        {"relative_error": -0.5},
        {"relative_error": 10**4000},
        {"relative_error": False},
        {"relative_error": [0.1]},
        {"factors": {}},
        {"factors": ["left"]},
        {"factors": None},
    ],
    ids=str,
)
def test_a_damaged_entry_is_refused_by_its_name(changed):
    assert refusal(with_entry(**changed)) == "tensor fc.weight: its manifest entry is damaged"


@pytest.mark.parametrize("entry", [None, [], "svd", 7, {}])
def test_an_entry_that_is_none_is_refused(entry):
    document = {**MANIFEST.to_json(), "layers": {"a\nb": entry}}
    assert refusal(document) == "tensor a\\nb: its manifest entry is damaged"


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "float8_e4m3fn", "float4"])
def test_values_that_cannot_be_factorised_have_no_factors(dtype):
    problem = f"tensor fc.weight: its manifest entry claims factors for {dtype} values"
    assert refusal(with_entry(dtype=dtype)) == problem


@pytest.mark.parametrize(
    "factor",
    [
        None,
        7,
        [],
        {},
        {"encoding": "csr"},
        {"encoding": "csr", "shape": None},
        {"encoding": "csr", "shape": [2, -4]},
        {"encoding": "csr", "shape": [2**62, 2**62]},
        {"encoding": 7, "shape": [2, 4]},
        {"encoding": "csr", "shape": [2, 4], "values": 8},
        {"encoding": "csr", "shape": [2, 4], "values": None},
        {"encoding": "csr", "values": "int8"},
        {"encoding": "csr", "shape": [2, -4], "values": "int8"},
    ],
)
def test_a_damaged_factor_is_refused_by_its_name(factor):
    problem = "tensor fc.weight: its manifest entry for factor left is damaged"
    assert refusal(with_entry(factors={"left": factor})) == problem


@pytest.mark.parametrize("text", ["", "[]", "1", "{", " {}", '{"version": 1, "version": 1}', '{"version": NaN}'])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(InputError) as caught:
        parse_manifest(text, PATH)
    assert str(caught.value).startswith(f"{PATH}: {OF_MANIFEST} JSON ")


def test_figures_that_json_cannot_hold_are_refused():
    text = compact_json(MANIFEST.to_json())
    for number in ("NaN", "Infinity", "1e999"):
        with pytest.raises(InputError) as caught:
            parse_manifest(text.replace('"bytes":500', f'"bytes":{number}'), PATH)
        assert str(caught.value) == f"{PATH}: {OF_MANIFEST} JSON cannot be read (a number in it is not finite)"


def test_a_checkpoint_without_manifest_is_not_compressed(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    with open_checkpoint(path) as checkpoint:
        assert not is_compressed(checkpoint)
        with pytest.raises(InputError) as caught:
            read_manifest(checkpoint)
    assert str(caught.value) == f"{path}: is not a compressed checkpoint: it has no tcompress manifest"


def sharded(folder, *manifests):
    """Write a shard of one tensor for each manifest, and their index."""
    names = [f"s{number}.safetensors" for number in range(len(manifests))]
    for name, manifest in zip(names, manifests, strict=True):
        metadata = None if manifest is None else {"tcompress": compact_json(manifest.to_json())}
        save_file({name: torch.ones(1)}, folder / name, metadata=metadata)
    index = folder / "model.tcompress.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    return open_checkpoint(index)


def test_the_manifests_of_all_shards_make_the_whole(tmp_path):
    parts = [MANIFEST.only(["fc.weight", "fc.bias"]), MANIFEST.only(["conv.weight"])]
    assert set(parts[1].layers) == {"conv.weight"}
    assert parts[1].rebuild == {"sparse": "matrix.reshape(shape)"}
    with sharded(tmp_path, *parts) as checkpoint:
        assert is_compressed(checkpoint)
        assert read_manifest(checkpoint) == MANIFEST


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        (None, "is not a compressed checkpoint: it has no tcompress manifest"),
        (Manifest("w", source={"sha256": "cd" * 32}), "is a shard of another checkpoint than the others"),
        (MANIFEST, "tensor conv.weight: is described in two shards"),
    ],
)
def test_shards_that_do_not_belong_together_are_refused(tmp_path, second, problem):
    with sharded(tmp_path, MANIFEST, second) as checkpoint, pytest.raises(InputError) as caught:
        read_manifest(checkpoint)
    assert str(caught.value) == f"{tmp_path / 's1.safetensors'}: {problem}"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["svd", "linear", "float32", "dense", 10**400, -(2**63)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = ["version", "writer", "source", "tied", "rebuild", "layers"]
changes = st.lists(
    st.tuples(st.sampled_from([*KEYS, *ENTRY.to_json(), "left", "right"]), json_values), min_size=1, max_size=3
)


@settings(max_examples=250, deadline=None)
@given(changes)
def test_any_change_of_a_manifest_is_read_or_refused(edits):
    document = MANIFEST.to_json()
    for key, value in edits:
        if key in KEYS:
            document[key] = value
        elif isinstance(document["layers"], dict) and isinstance(document["layers"].get("fc.weight"), dict):
            entry = document["layers"]["fc.weight"]
            place = entry["factors"] if key in {"left", "right"} and isinstance(entry["factors"], dict) else entry
            place[key] = value
    message = ""
    try:
        parsed = parse(document)
        assert parse(parsed.to_json()) == parsed
    except TcompressError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30) | json_values.map(json.dumps))
def test_any_text_is_read_or_refused(text):
    with pytest.raises(InputError):
        parse_manifest(text, PATH)
