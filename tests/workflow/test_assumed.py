"""What is assumed of inputs that no data show, and where plans, rules and options say so."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress import compress, decompress, make_plan, open_checkpoint
from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.errors import FormatError, UsageError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.metric import PLAIN
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker
from tcompress.workflow.assumed import PLAIN_INPUTS, SMOOTH, assumed_metric
from tcompress.workflow.plan import Plan, Rule, Target, parse_plan


def layer(kind, *shape):
    return Layer("a.weight", kind, shape, BY_TORCH[torch.float32])


def smooth_pictures(count=400, size=16, seed=0):
    """Pictures of noise that was seen through a lens: neighbours are alike, channels have nothing in common."""
    noise = torch.randn(count, 6, size + 2, size + 2, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1)


def test_neighbours_of_a_kernel_are_alike_and_channels_are_not():
    gram = assumed_metric(layer(LayerKind.CONV, 8, 4, 1, 3), SMOOTH).gram
    torch.testing.assert_close(gram, torch.tensor([[1, 0.6, 0.36], [0.6, 1, 0.6], [0.36, 0.6, 1]]))
    square = assumed_metric(layer(LayerKind.CONV, 8, 4, 2, 2), SMOOTH).gram
    torch.testing.assert_close(square[0], torch.tensor([1, 0.6, 0.6, 0.36]))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(LayerKind.LINEAR, (8, 4)), (LayerKind.EMBEDDING, (8, 4)), (LayerKind.CONV, (8, 4, 1, 1))],
    ids=["linear", "embedding", "pointwise"],
)
def test_of_other_inputs_nothing_is_assumed(kind, shape):
    assert assumed_metric(layer(kind, *shape), SMOOTH) == PLAIN
    assert assumed_metric(layer(LayerKind.CONV, 8, 4, 3, 3), None) == PLAIN
    assert assumed_metric(layer(LayerKind.CONV, 8, 4, 3, 3), PLAIN_INPUTS) == PLAIN


@pytest.fixture(scope="module")
def convolution(tmp_path_factory):
    """A checkpoint of one convolution whose weights are noise, and its path."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    weight = torch.randn(24, 6, 3, 3, generator=torch.Generator().manual_seed(1))
    save_file({"conv.weight": weight}, path)
    return path


def written(path, plan, out):
    with open_checkpoint(path) as checkpoint:
        result = compress(checkpoint, plan, out=out)
    with open_checkpoint(out) as checkpoint:
        decompress(checkpoint, out=out.with_suffix(".plain.safetensors"))
    return result, load_file(out.with_suffix(".plain.safetensors"))["conv.weight"]


@pytest.mark.parametrize(
    "setting", [SVD(rank=6), Tucker(rank=6), Sparse(density=0.3), LowRankSparse(rank=2, density=0.2)], ids=str
)
def test_smooth_pictures_come_out_better_and_the_weight_worse(setting, convolution, tmp_path):
    dense, pictures = load_file(convolution)["conv.weight"], smooth_pictures()
    errors, outputs = [], []
    for number, inputs in enumerate([None, SMOOTH]):
        plan = parse_plan(Plan((Rule("*", setting, inputs=inputs),)).to_json(), "plan.json")
        result, weight = written(convolution, plan, tmp_path / f"{number}.safetensors")
        errors.append(result.layers[0].relative_error)
        assert errors[-1] == pytest.approx(float((dense - weight).norm() / dense.norm()), rel=1e-4)
        assert result.plan["rules"][0].get("inputs") == inputs
        outputs.append(float(torch.nn.functional.conv2d(pictures, dense - weight).square().mean()))
    assert errors[1] > errors[0]
    assert outputs[1] < 0.9 * outputs[0]


def test_plans_assume_smooth_inputs_and_say_so(convolution, tmp_path):
    with open_checkpoint(convolution) as checkpoint:
        usual, plain = make_plan(checkpoint, keep=0.1), make_plan(checkpoint, keep=0.1, inputs=PLAIN_INPUTS)
        of_weights = make_plan(checkpoint, max_error=0.5)
    (rule,) = usual.plan.rules
    assert rule.inputs == SMOOTH
    assert "smooth inputs" in rule.comments["why"]
    assert [plan.plan.rules[0].inputs for plan in (plain, of_weights)] == [None, None]
    result, _ = written(convolution, usual.plan, tmp_path / "out.safetensors")
    assert result.layers[0].stored_bytes == usual.stored_bytes


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ({"format": "svd", "rank": 2, "inputs": "rough"}, "'rough' is nothing to assume"),
        ({"format": "joint", "keep": 0.5, "inputs": "smooth"}, "joint assumes nothing of inputs"),
        ({"format": "svd", "tolerance": 0.1, "inputs": "smooth"}, "a tolerance is about the weight"),
    ],
)
def test_what_cannot_be_assumed_is_refused(rule, problem):
    with pytest.raises(UsageError, match=problem):
        parse_plan({"version": 1, "rules": [{"match": "*", **rule}]}, "plan.json")


def test_rules_of_a_program_are_checked_as_well():
    with pytest.raises(FormatError, match="a tolerance is about the weight"):
        Rule("*", Target(SVD, {}, tolerance=0.1), inputs=SMOOTH)
    with pytest.raises(FormatError, match="nothing to assume"):
        Rule("*", SVD(rank=2), inputs="rough")
