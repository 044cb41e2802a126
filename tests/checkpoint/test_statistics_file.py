"""Files of statistics: the same bytes for the same content, and nothing is believed that is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.statistics_file import (
    METADATA_KEY,
    LayerStatistics,
    Statistics,
    read_statistics,
    write_statistics,
)
from tcompress.errors import InputError, NumericalError, OutputError, UnsupportedError


def layer(shape, *, diagonal=False, counts=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fan_in = torch.tensor(shape[1:]).prod().item()
    rows = torch.randn(50, fan_in, generator=generator, dtype=torch.float64)
    moment = rows.square().mean(0) if diagonal else rows.T @ rows / 50
    moment = moment if diagonal else (moment + moment.T) / 2
    if counts:
        moment = torch.randint(0, 9, (shape[0],), generator=generator).double()
    return LayerStatistics(
        shape=shape,
        moment=moment,
        mean=None if counts else rows.mean(0),
        sensitivity=torch.rand(shape[1 if counts else 0], generator=generator, dtype=torch.float64),
        positions=50,
        positions_per_sample=2.5,
        counts=counts,
    )


@pytest.fixture
def statistics():
    layers = {
        "fc.weight": layer((6, 4)),
        "conv.weight": layer((3, 2, 3, 3), seed=1),
        "wide.weight": layer((2, 5), diagonal=True),
        "embed.weight": layer((7, 3), counts=True),
    }
    return Statistics("ab" * 32, "loss", 12, layers, untraced={"x": "why"}, spilled=("fc.weight",), notes=("n",))


@pytest.fixture
def path(statistics, tmp_path):
    write_statistics(statistics, tmp_path / "s.safetensors")
    return tmp_path / "s.safetensors"


def test_what_is_written_is_read_in_the_precision_of_the_file(statistics, path):
    found = read_statistics(path)
    assert (found.source, found.sensitivity_of, found.batches) == ("ab" * 32, "loss", 12)
    assert (found.untraced, found.spilled, found.notes) == ({}, (), ()), "these belong to the run"
    assert set(found.layers) == set(statistics.layers)
    for name, wanted in statistics.layers.items():
        got = found.layers[name]
        for part in ("moment", "mean", "sensitivity"):
            one, two = getattr(got, part), getattr(wanted, part)
            assert two is None if one is None else torch.equal(one, two.float().double())
        assert (got.shape, got.positions, got.positions_per_sample) == (wanted.shape, 50, 2.5)
        assert (got.kind, got.diagonal, got.counts) == (wanted.kind, wanted.diagonal, wanted.counts)
    kinds = [found.layers[name].kind for name in ("fc.weight", "conv.weight", "embed.weight")]
    assert kinds == [LayerKind.LINEAR, LayerKind.CONV, LayerKind.EMBEDDING]
    assert found.layers["conv.weight"].fan_in == 18


def test_other_tools_see_plain_float32_and_one_key(path):
    assert {str(tensor.dtype) for tensor in load_file(path).values()} == {"torch.float32"}
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == [METADATA_KEY]
        text = file.metadata()[METADATA_KEY]
    document = json.loads(text)
    assert list(document) == sorted(document)
    assert document["version"] == 1
    assert document["layers"]["wide.weight"] == {
        "counts": False, "diagonal": True, "positions": 50, "positions_per_sample": 2.5, "shape": [2, 5],
    }  # fmt: skip
    assert ": " not in text


def test_the_same_content_has_the_same_bytes_and_an_output_is_not_replaced_unasked(statistics, path):
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already; use --force"):
        write_statistics(statistics, path)
    backwards = replace(statistics, layers=dict(statistics.layers))
    write_statistics(backwards, path, force=True)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["s.safetensors"]


def test_what_float32_cannot_hold_leaves_no_file(statistics, tmp_path):
    large = replace(statistics.layers["fc.weight"], sensitivity=torch.full((6,), 1e300, dtype=torch.float64))
    with pytest.raises(NumericalError, match=r"tensor a\.weight\.sensitivity: has values that float32 cannot hold"):
        write_statistics(replace(statistics, layers={"a.weight": large}), tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())


def damaged(path, change):
    """Write the file again with its tensors and its document changed."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        document = json.loads(file.metadata()[METADATA_KEY])
    change(tensors, document)
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(document)})
    return path


def symmetric(tensors, document):
    del document
    tensors["fc.weight.moment"][0, 1] += 1


@pytest.mark.parametrize(
    ("change", "tensor", "says"),
    [
        (symmetric, "fc.weight.moment", "is not symmetric"),
        (lambda t, _: t["fc.weight.moment"].fill_diagonal_(-1), "fc.weight.moment", "negative values on its diagonal"),
        (lambda t, _: t["wide.weight.moment"].neg_(), "wide.weight.moment", "holds negative values"),
        (lambda t, _: t["embed.weight.moment"].sub_(99), "embed.weight.moment", "holds negative values"),
        (lambda t, _: t["fc.weight.sensitivity"].neg_(), "fc.weight.sensitivity", "holds negative values"),
        (lambda t, _: t["fc.weight.mean"].fill_(torch.nan), "fc.weight.mean", "holds NaN or Inf"),
        (lambda t, _: t["conv.weight.moment"].fill_(torch.inf), "conv.weight.moment", "holds NaN or Inf"),
        (lambda t, _: t.pop("fc.weight.mean"), "fc.weight.mean", "is missing from the statistics"),
        (lambda t, _: t.update(x=torch.ones(1)), "x", "belongs to no layer of these statistics"),
        (lambda t, _: t.update({"fc.weight.mean": torch.ones(3)}), "fc.weight.mean", r"of shape \(3,\); float32 of"),
        (lambda t, _: t.update({"fc.weight.mean": torch.ones(4).half()}), "fc.weight.mean", "is float16 of shape"),
        (lambda _, d: d["layers"]["fc.weight"].update(shape=[6, 5]), "fc.weight.moment", r"float32 of shape \(5, 5\)"),
        (lambda _, d: d["layers"]["fc.weight"].update(shape=[6]), "fc.weight", "entry in the statistics is damaged"),
        (lambda _, d: d["layers"]["fc.weight"].update(shape=[6, 0]), "fc.weight", "is damaged"),
        (lambda _, d: d["layers"]["fc.weight"].update(shape=[6, True]), "fc.weight", "is damaged"),
        (lambda _, d: d["layers"]["fc.weight"].update(positions=-1), "fc.weight", "is damaged"),
        (lambda _, d: d["layers"]["fc.weight"].update(positions_per_sample="2"), "fc.weight", "is damaged"),
        (lambda _, d: d["layers"]["embed.weight"].update(diagonal=True), "embed.weight", "is damaged"),
        (lambda _, d: d["layers"].update({"a.weight": 3}), "a.weight", "is damaged"),
        (lambda _, d: d.pop("source"), None, "lack source, sensitivity_of, batches or layers"),
        (lambda _, d: d.update(sensitivity_of="x"), None, "lack source, sensitivity_of, batches or layers"),
        (lambda _, d: d.update(version="1"), None, "have no version"),
    ],
)  # fmt: skip
def test_everything_that_cannot_be_is_refused_by_name(path, change, tensor, says):
    with pytest.raises(InputError, match=says) as caught:
        read_statistics(damaged(path, change))
    assert (caught.value.path, caught.value.tensor) == (path, tensor)


def test_newer_versions_and_other_files_say_what_to_do(path, fixtures):
    with pytest.raises(UnsupportedError, match="is of version 2; this tcompress reads up to 1; make one with"):
        read_statistics(damaged(path, lambda _, document: document.update(version=2)))
    with pytest.raises(InputError, match="is no file of statistics; make one with `tcompress calibrate`"):
        read_statistics(fixtures / "digits_mlp.safetensors")
