"""Plans: what a person may write, and what they are told when it makes no sense."""

from __future__ import annotations

import json

import pytest
import torch

from tcompress.checkpoint.dtypes import BY_NAME
from tcompress.checkpoint.layers import Layer, LayerKind
from tcompress.errors import FormatError, UsageError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.plan import Plan, Rule, Target, check_matches, exactly, parse_plan, plan_for, read_plan


def layer(name):
    return Layer(name, LayerKind.LINEAR, (8, 8), BY_NAME["float32"])


def document(*rules):
    return {"version": 1, "rules": list(rules)}


def test_a_plan_reads_what_it_writes():
    plan = Plan(
        (
            Rule("head.*", None),
            Rule("layers.*.q.weight", SVD(rank=8)),
            Rule("layers.*", Target(SVD, {"seed": 3}, keep=0.25)),
            Rule("embed.*", Target(Sparse, tolerance=0.1)),
            Rule("conv.*", SVD(rank=2), store=torch.int8),
            Rule("fc.*", Target(SVD, rank_rule="evbmf:0.8")),
            Rule("*", Sparse(density=0.1), one_threshold=True),
        )
    )
    assert parse_plan(json.loads(json.dumps(plan.to_json())), "plan.json") == plan


def test_the_first_rule_that_matches_decides():
    plan = parse_plan(document({"match": "a.*", "format": "dense"}, {"match": "*", "format": "svd", "rank": 2}), "p")
    assert plan.rule_for("a.weight").format is None
    assert plan.rule_for("b.weight").format == SVD(rank=2)


def test_names_with_brackets_are_matched_by_their_own_rule_alone():
    name = "blocks[0].w*.weight"
    rule = Rule(exactly(name), None)
    assert rule.matches(name)
    assert not rule.matches("blocks0.wq.weight")


def test_excluded_layers_stay_dense_and_included_ones_do_not():
    plan = plan_for(SVD(rank=1), include=["enc.*", "dec.*"], exclude=["*.head.*"])
    assert plan.rule_for("enc.head.weight").format is None
    assert plan.rule_for("dec.fc.weight").format == SVD(rank=1)
    assert plan.rule_for("other.weight") is None


def test_every_problem_of_a_plan_is_told_at_once():
    rules = [
        {"match": "*", "format": "svd"},
        {"format": "svd", "rank": 3},
        {"match": "*", "format": "tensor-train-of-thought", "rank": 3},
        {"match": "*", "format": "svd", "rank": 0},
        {"match": "*", "format": "svd", "rank": 3, "keep": 0.5},
        {"match": "*", "format": "sparse", "keep": 1.5},
        {"match": "*", "format": "sparse", "keep": 0.5, "tolerance": 0.5},
        {"match": "*", "format": "svd", "keep": 0.5, "global": True},
        {"match": "*", "format": "sparse", "tolerance": 0.5, "global": True},
        {"match": "*", "format": "dense", "rank": 2},
        "*",
    ]
    with pytest.raises(UsageError) as caught:
        parse_plan(document(*rules), "plan.json")
    problems = str(caught.value).removeprefix("plan.json: ").split("; rule ")
    assert [problem.removeprefix("rule ").split(":")[0] for problem in problems] == [str(n) for n in range(1, 12)]
    assert "there is no format 'tensor-train-of-thought'; there are: svd, tt, " in problems[2]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "the plan is not JSON"),
        ("[]", 'a plan is {"version": 1'),
        ('{"version": 2, "rules": []}', "is a plan of version 2; this tcompress reads version 1"),
        ("[" * 100_000, "the plan is not JSON"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, content, problem):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"plan\.json") as caught:
        read_plan(path)
    assert problem in str(caught.value)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none.json: the plan cannot be read \(No such file or directory\)"):
        read_plan(tmp_path / "none.json")


def test_a_rule_without_its_layer_is_a_problem_and_an_idle_pattern_is_not():
    layers = [layer("a.weight"), layer("b.weight")]
    check_matches(Plan((Rule("c.*", None), Rule("a.*", SVD(rank=1)))), layers)
    with pytest.raises(UsageError, match=r"no layer is called c\.weight; there are a\.weight, b\.weight"):
        check_matches(Plan((Rule("c.weight", None), Rule("*", SVD(rank=1)))), layers)
    with pytest.raises(UsageError, match=r"no layer matches c.\*; there are a.weight, b.weight"):
        check_matches(Plan((Rule("c.*", None),)), layers)


def test_a_target_needs_exactly_one_budget():
    with pytest.raises(FormatError, match="svd: give one of rank, keep and tolerance"):
        Target(SVD)
    with pytest.raises(FormatError, match="svd: rank is given beside keep or tolerance"):
        Target(SVD, {"rank": 2}, keep=0.5)


@pytest.mark.parametrize("name", ["int2", 8, ["int8"]])
def test_a_type_that_nothing_is_stored_in_is_told(name):
    with pytest.raises(UsageError, match="rule 1: dtype is one of bf16, fp16, fp32, fp64, int8, int4, int3"):
        parse_plan(document({"match": "*", "format": "svd", "rank": 2, "dtype": name}), "p")


def test_a_rank_rule_is_known_and_for_svd():
    with pytest.raises(UsageError, match="'magic' is no rank rule"):
        Target(SVD, rank_rule="magic")
    with pytest.raises(FormatError, match="sparse: a rank rule looks at the spectrum"):
        Target(Sparse, rank_rule="evbmf")
