"""One budget in, a plan out: it keeps within the budget, says what comes, and is no worse than any single format."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.statistics_file import LayerStatistics, Statistics
from tcompress.errors import LimitError, NumericalError, UsageError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.budgeting import make_plan, matching
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.plan import Target, parse_plan, plan_for
from tcompress.workflow.results import describe
from tcompress.workflow.settings import Settings

TWO = (SVD, Sparse)  # all that most of this is about


@pytest.fixture
def model(tmp_path):
    """A layer of rank 3, one of few large values, one of noise, and a bias."""
    random = torch.Generator().manual_seed(0)
    low = torch.randn(48, 3, generator=random) @ torch.randn(3, 40, generator=random)
    thin = torch.zeros(48, 40)
    thin.view(-1)[::17] = torch.randn(113, generator=random)
    noise = torch.randn(64, 48, generator=random)
    path = tmp_path / "model.safetensors"
    save_file({"low.weight": low, "thin.weight": thin, "noise.weight": noise, "noise.bias": torch.zeros(64)}, path)
    return path


def loss_of(result):
    return sum(math.sqrt(row.layer.values) * (row.relative_error or 0) ** 2 for row in result.layers)


@pytest.mark.parametrize("keep", [0.5, 0.2, 0.08])
def test_the_factors_keep_within_the_budget_and_use_it(model, tmp_path, keep):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, keep=keep, formats=TWO)
        result = compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors")
    dense = sum(row.layer.dense_bytes for row in result.layers)
    written = sum(row.stored_bytes for row in result.layers)
    assert written <= keep * dense
    assert 0.95 * planned.stored_bytes < written <= planned.stored_bytes  # it has zeros that no plan knows of
    assert planned.bound <= planned.loss * (1 + 1e-9)


@pytest.mark.parametrize("max_bytes", [12000, 6000])
def test_a_budget_for_the_file_is_kept_by_the_file(model, tmp_path, max_bytes):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, max_bytes=max_bytes, formats=TWO)
        result = compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors")
    assert 0.8 * max_bytes < result.stored_bytes <= max_bytes


def test_each_layer_gets_what_suits_it(model):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, keep=0.12, formats=TWO, settings=Settings(store=torch.float32))
    chosen = {each.layer.name: each.chosen.format.name for each in planned.layers if each.chosen.format}
    assert chosen["low.weight"] == "svd"
    assert chosen["thin.weight"] == "sparse"


@pytest.mark.parametrize("kind", [SVD, Sparse])
def test_it_is_better_than_one_format_for_all_at_equal_bytes(model, tmp_path, kind):
    with open_checkpoint(model) as checkpoint:
        own = make_plan(checkpoint, keep=0.15, formats=TWO)
        planned = compress(checkpoint, own.plan, out=tmp_path / "planned.safetensors")
        for store in (None, torch.int8):
            settings = Settings(store=store)
            uniform = compress(
                checkpoint,
                plan_for(Target(kind, keep=0.15)),
                out=tmp_path / "o.safetensors",
                settings=settings,
                force=True,
            )
            assert loss_of(planned) < loss_of(uniform)


def test_the_same_model_gives_the_same_plan_and_the_plan_reads_what_it_wrote(model):
    with open_checkpoint(model) as checkpoint:
        first, second = (make_plan(checkpoint, keep=0.1, formats=TWO).plan.to_json() for _ in range(2))
    assert first == second
    assert parse_plan(json.loads(json.dumps(first)), "plan").to_json() == first


def test_formats_and_types_that_are_given_are_the_only_ones(model):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, keep=0.2, formats=[SVD], settings=Settings(store=torch.int8))
    chosen = [each.chosen for each in planned.layers if each.chosen.format]
    assert chosen
    assert all(isinstance(each.format, SVD) and each.store == torch.int8 for each in chosen)


def test_a_budget_that_cannot_be_met_is_told_with_the_smallest_that_can(model, tmp_path):
    with open_checkpoint(model) as checkpoint:
        with pytest.raises(LimitError, match=r"the smallest takes [0-9]+, --keep ") as told:
            make_plan(checkpoint, keep=0.001, formats=TWO)
        least = float(str(told.value).rsplit(" ", 1)[1])
        planned = make_plan(checkpoint, keep=least, formats=TWO)
        compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors")


def test_layers_that_are_left_out_stay_dense_and_do_not_count(model, tmp_path):
    with open_checkpoint(model) as checkpoint:
        layers = matching(checkpoint, ["*.weight"], ["noise.*"])
        planned = make_plan(checkpoint, keep=0.2, layers=layers, formats=TWO)
        result = compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors")
        with pytest.raises(UsageError, match="no layer matches nothing"):
            matching(checkpoint, ["nothing"], [])
    by_name = {row.layer.name: row for row in result.layers}
    assert by_name["noise.weight"].format is None
    assert sum(row.stored_bytes for name, row in by_name.items() if name != "noise.weight") <= 0.2 * 2 * 48 * 40 * 4


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give one budget"),
        ({"keep": 0.5, "flops": 0.5}, "give one budget"),
        ({"flops": 1.5}, "--flops is a fraction from 0 to 1, got 1.5"),
        ({"max_error": math.nan}, "--max-error is a number from 0 on, got nan"),
        ({"keep": 0.5, "rank_multiple": 0}, "--rank-multiple is a whole number"),
    ],
)
def test_one_budget_that_can_be_is_asked_for(model, budget, message):
    with open_checkpoint(model) as checkpoint, pytest.raises(UsageError, match=message):
        make_plan(checkpoint, **budget)


def test_every_format_is_tried_unasked(model):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, keep=0.2, layers=matching(checkpoint, ["low.*"], []))
    (layer,) = planned.layers
    assert {each.format.name for each in layer.curve if each.format} >= {"svd", "sparse"}
    assert planned.stored_bytes <= planned.limit == math.floor(0.2 * layer.layer.dense_bytes)


@pytest.mark.parametrize("max_error", [0.5, 0.01])
def test_no_layer_has_a_larger_error_and_a_smaller_candidate_has(model, tmp_path, max_error):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, max_error=max_error, formats=TWO)
        result = compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors")
    assert 0 < result.largest_error <= max_error
    smaller = []
    for row, layer in zip(result.layers, planned.layers, strict=True):
        assert row.stored_bytes == layer.chosen.stored_bytes
        assert (row.relative_error or 0) ** 2 == pytest.approx(layer.chosen.loss)
        smaller += [each for each in layer.curve if each.is_fitted and each.stored_bytes < 0.9 * row.stored_bytes]
    assert smaller
    assert all(math.sqrt(each.loss) > max_error for each in smaller)
    assert planned.bound <= planned.loss


def test_an_error_of_nothing_is_kept_as_well(model):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, max_error=0, formats=TWO)
    assert planned.loss == 0


def test_multiplications_keep_within_their_budget_and_bytes_do_not_count(model):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, flops=0.3, formats=TWO)
        with pytest.raises(LimitError, match=r"multiplications; the smallest takes [0-9]+, --flops ") as told:
            make_plan(checkpoint, flops=0.001, formats=TWO)
        least = float(str(told.value).rsplit(" ", 1)[1])
        make_plan(checkpoint, flops=least, formats=TWO)
    dense = sum(each.layer.values for each in planned.layers)
    assert sum(each.dense_multiplications for each in planned.layers) == dense
    assert 0.25 * dense < sum(each.multiplications for each in planned.layers) <= planned.limit <= 0.3 * dense
    assert {each.chosen.store for each in planned.layers} == {torch.float32}
    assert any("one position" in note for note in planned.notes)


def test_all_ranks_are_multiples(model):
    with open_checkpoint(model) as checkpoint:
        planned = make_plan(checkpoint, keep=0.5, formats=[SVD], rank_multiple=4)
    ranks = {each.format.rank for layer in planned.layers for each in layer.curve if each.format}
    assert len(ranks) > 2
    assert all(rank % 4 == 0 for rank in ranks)


def test_an_all_zero_layer_and_one_that_is_not_finite_do_no_harm(tmp_path):
    path = tmp_path / "odd.safetensors"
    odd = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    odd[3, 4] = math.nan
    save_file({"zero.weight": torch.zeros(32, 32), "odd.weight": odd}, path)
    with open_checkpoint(path) as checkpoint:
        with pytest.raises(NumericalError, match=r"tensor odd.weight: holds 1 value that is NaN or Inf; --allow-nonf"):
            make_plan(checkpoint, keep=0.9, formats=TWO)
        planned = make_plan(checkpoint, keep=0.9, formats=TWO, settings=Settings(allow_nonfinite=True))
        result = dry_run(checkpoint, planned.plan)
    assert {row.layer.name: row.reason for row in result.layers}["odd.weight"] == "holds 1 value that is NaN or Inf"
    assert {each.layer.name: each.why for each in planned.layers}["odd.weight"] == "holds 1 value that is NaN or Inf"
    chosen = {each.layer.name: each.chosen for each in planned.layers}
    assert chosen["odd.weight"].format is None
    assert chosen["zero.weight"].loss <= 1e-12
    assert chosen["zero.weight"].stored_bytes == 0


def test_a_layer_that_can_only_stay_dense_says_why_and_does_no_harm_beside_statistics(model):
    tensors = load_file(model)
    tensors["noise.weight"][0, 0] = math.inf
    save_file({**tensors, "low.weight.extra": torch.zeros(2)}, model)
    layers = {
        name: LayerStatistics(
            tuple(tensors[name].shape), torch.ones(tensors[name].shape[1]), None, torch.ones(len(tensors[name])), 8, 1.0
        )
        for name in ("thin.weight", "noise.weight")
    }
    with open_checkpoint(model) as checkpoint:
        known = Statistics(describe(checkpoint).sha256, "loss", 1, layers)
        for budget in ({"keep": 0.9}, {"max_error": 0.3}, {"flops": 0.9}, {"max_bytes": 28000}):
            planned = make_plan(
                checkpoint, **budget, formats=TWO, statistics=known, settings=Settings(allow_nonfinite=True)
            )
            why = {each.layer.name: each.why for each in planned.layers}
            assert why["noise.weight"] == "holds 1 value that is NaN or Inf"
            assert why["low.weight"] == "tensor low.weight.extra has a name that its factors would take"
            assert math.isfinite(planned.loss)
