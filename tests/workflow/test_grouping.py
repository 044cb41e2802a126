"""Layers fitted as one: which, when it pays, and how the file looks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import UsageError
from tcompress.formats.joint import Joint
from tcompress.formats.svd import SVD
from tcompress.workflow.analysis import analyze
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decompression import decompress
from tcompress.workflow.inspection import inspect
from tcompress.workflow.plan import Target, parse_plan, plan_for
from tcompress.workflow.reconstruction import Reconstruction
from tcompress.workflow.settings import Settings
from tcompress.workflow.task import load_task
from tcompress.workflow.tracing import NEEDS
from tcompress.workflow.verification import verify


def siblings(count=6, out=48, in_=40, rank=4, noise=0.02, seed=0):
    """Weights that share the spaces of their rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, in_, generator=generator)
    cores = [torch.randn(rank, rank, generator=generator) for _ in range(count)]
    weights = [left @ core @ right for core in cores]
    return [w + noise * w.std() * torch.randn(w.shape, generator=generator) for w in weights]


@pytest.fixture
def family(tmp_path):
    """Six layers that share bases, two strangers to each other, and one alone."""
    generator = torch.Generator().manual_seed(9)
    tensors = {f"layers.{n}.fc.weight": weight for n, weight in enumerate(siblings())}
    for n in range(2):  # each of rank two, in spaces of its own
        tensors[f"layers.{n}.up.weight"] = torch.randn(64, 2, generator=generator) @ torch.randn(
            2, 48, generator=generator
        )
    tensors["head.weight"] = torch.randn(48, 40, generator=generator)
    tensors["head.bias"] = torch.zeros(48)
    path = tmp_path / "family.safetensors"
    save_file(tensors, path)
    return path


def by_name(result):
    return {row.layer.name: row for row in result.layers}


def there_and_back(path, plan, tmp_path, **options):
    model, small, dense = open_checkpoint(path), tmp_path / "small.safetensors", tmp_path / "dense.safetensors"
    planned, result = dry_run(model, plan, **options), compress(model, plan, out=small, **options)
    assert planned.stored_bytes == result.stored_bytes == small.stat().st_size
    assert verify(open_checkpoint(small), against=model).problems == ()
    decompress(open_checkpoint(small), out=dense)
    assert {name: info.shape for name, info in open_checkpoint(dense).items()} == {
        name: info.shape for name, info in model.items()
    }
    return result


def test_layers_of_one_shape_and_name_share_their_factors(family, tmp_path):
    result = there_and_back(family, plan_for(Joint(ranks=(6, 4, 4))), tmp_path)
    rows = by_name(result)
    for n in range(6):
        assert rows[f"layers.{n}.fc.weight"].format == Joint(ranks=(6, 4, 4))
        assert rows[f"layers.{n}.fc.weight"].relative_error < 0.03
    names = set(open_checkpoint(tmp_path / "small.safetensors"))
    stem = "shared.layers.#.fc.weight/48x40-float32"
    assert {f"{stem}.core", f"{stem}.out_basis", f"{stem}.in_basis", "layers.3.fc.weight.mix"} <= names
    # Six layers cost two bases, a core and a row each, far less than a pair of factors each.
    stored = sum(row.stored_bytes for row in result.layers if row.format is not None)
    assert stored == 4 * (48 * 4 + 40 * 4 + 6 * 4 * 4 + 6 * 6)


def test_a_group_that_is_better_apart_stays_dense_and_says_what_is_better(family, tmp_path):
    rows = by_name(there_and_back(family, plan_for(Joint(ranks=(6, 4, 4))), tmp_path))
    reason = rows["layers.0.up.weight"].reason
    assert reason.startswith(
        "2 layers are better apart: at the same bytes svd has an error of 0.0000, joint:ranks=6,4,4 of"
    )


def test_a_layer_alone_has_nothing_to_share(family, tmp_path):
    rows = by_name(there_and_back(family, plan_for(Joint(ranks=(6, 4, 4))), tmp_path))
    assert rows["head.weight"].reason.startswith("has nothing to share factors with")


def test_a_plan_puts_layers_together_by_name(family, tmp_path):
    rule = {"format": "joint", "ranks": [6, 4, 4], "together": "band"}
    plan = parse_plan(
        {"version": 1, "rules": [{"match": "layers.?.fc.*", **rule}, {"match": "*", "format": "dense"}]}, "plan"
    )
    result = there_and_back(family, plan, tmp_path)
    assert sum(row.format is not None for row in result.layers) == 6
    assert "shared.band.core" in open_checkpoint(tmp_path / "small.safetensors")


def test_the_plan_written_repeats_the_run(family, tmp_path):
    first = compress(open_checkpoint(family), plan_for(Joint(ranks=(6, 4, 4))), out=tmp_path / "first.safetensors")
    plan = parse_plan(json.loads(json.dumps(first.plan)), "plan")
    compress(open_checkpoint(family), plan, out=tmp_path / "second.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "second.safetensors").read_bytes()


def test_layers_that_cannot_be_together_are_all_told_before_any_work(family, tmp_path):
    rules = [
        {"match": "layers.0.*", "format": "joint", "rank": 4, "together": "mixed"},
        {"match": "layers.1.fc.*", "format": "joint", "rank": 4, "together": "torn"},
        {"match": "layers.2.fc.*", "format": "joint", "rank": 5, "together": "torn"},
    ]
    with pytest.raises(UsageError) as caught:
        compress(
            open_checkpoint(family), parse_plan({"version": 1, "rules": rules}, "plan"), out=tmp_path / "o.safetensors"
        )
    assert "together mixed: layers.0.up.weight is float32 (64, 48)" in str(caught.value)
    assert "together torn: its rules ask for different settings" in str(caught.value)
    assert not (tmp_path / "o.safetensors").exists()


def test_only_formats_of_several_layers_take_together():
    rule = {"match": "*", "format": "svd", "rank": 4, "together": "band"}
    with pytest.raises(UsageError, match="together: svd:rank=4 fits each layer for itself"):
        parse_plan({"version": 1, "rules": [rule]}, "plan")


@pytest.mark.parametrize("store", [None, torch.bfloat16], ids=str)
def test_keep_counts_the_bytes_of_the_whole_group(family, tmp_path, store):
    rows = by_name(there_and_back(family, plan_for(Target(Joint, keep=0.1)), tmp_path, settings=Settings(store=store)))
    members = [rows[f"layers.{n}.fc.weight"] for n in range(6)]
    assert all(row.format is not None for row in members)
    dense = sum(row.layer.dense_bytes for row in members)
    assert 0.05 * dense < sum(row.stored_bytes for row in members) <= 0.1 * dense


def test_a_tolerance_holds_for_every_member(family, tmp_path):
    rows = by_name(there_and_back(family, plan_for(Target(Joint, tolerance=0.05)), tmp_path))
    for n in range(6):
        assert rows[f"layers.{n}.fc.weight"].relative_error <= 0.05


def test_a_shared_basis_is_the_other_method(family, tmp_path):
    result = there_and_back(family, plan_for(Joint(rank=4, method="svd")), tmp_path)
    assert sum(row.format is not None for row in result.layers) == 6
    assert "layers.0.fc.weight.left" in open_checkpoint(tmp_path / "small.safetensors")


def test_all_of_a_group_lies_in_one_shard(family, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    family.rename(folder / "model.safetensors")
    out = tmp_path / "out"
    plan = plan_for(Joint(ranks=(6, 4, 4)))
    compress(open_checkpoint(folder), plan, out=out, max_shard_bytes=8000)
    found = open_checkpoint(out)
    assert len(found.shards) > 2
    holding = [shard for shard in found.shards if any(".fc.weight" in name for name in shard)]
    assert len(holding) == 1
    assert verify(found, against=open_checkpoint(folder)).problems == ()
    decompress(found, out=tmp_path / "back")


def test_the_bytes_of_the_members_make_the_whole(family, tmp_path):
    compress(open_checkpoint(family), plan_for(Joint(ranks=(6, 4, 4))), out=tmp_path / "small.safetensors")
    small = open_checkpoint(tmp_path / "small.safetensors")
    rows = inspect(small).rows
    assert {row.name for row in rows} == set(open_checkpoint(family))
    assert sum(row.stored_bytes for row in rows) == sum(info.nbytes for info in small.values())


def test_a_name_that_the_shared_factors_would_take_keeps_the_group_dense(tmp_path):
    tensors = {f"a.{n}.weight": weight for n, weight in enumerate(siblings())}
    tensors["shared.a.#.weight/48x40-float32.core"] = torch.zeros(3)
    save_file(tensors, tmp_path / "clash.safetensors")
    rows = by_name(there_and_back(tmp_path / "clash.safetensors", plan_for(Joint(ranks=(6, 4, 4))), tmp_path))
    assert "has a name that the shared factors would take" in rows["a.0.weight"].reason


def test_a_member_with_nan_stays_out_of_the_group(tmp_path):
    weights = siblings()
    weights[2][0, 0] = torch.nan
    save_file({f"a.{n}.weight": weight for n, weight in enumerate(weights)}, tmp_path / "nan.safetensors")
    result = compress(
        open_checkpoint(tmp_path / "nan.safetensors"),
        plan_for(Joint(ranks=(6, 4, 4))),
        out=tmp_path / "small.safetensors",
        settings=Settings(allow_nonfinite=True),
    )
    rows = by_name(result)
    assert "NaN or Inf" in rows["a.2.weight"].reason
    assert sum(row.format is not None for row in result.layers) == 5
    assert verify(open_checkpoint(tmp_path / "small.safetensors")).problems == ()


def test_analysis_says_of_each_member_what_compressing_gives(family, tmp_path):
    said = {
        row.layer.name: row for row in analyze(open_checkpoint(family), [Joint(ranks=(6, 4, 4)), SVD(rank=4)]).rows[::2]
    }
    done = by_name(
        compress(open_checkpoint(family), plan_for(Joint(ranks=(6, 4, 4))), out=tmp_path / "small.safetensors")
    )
    for name, row in said.items():
        assert row.asked == "joint:ranks=6,4,4"
        assert row.worthwhile == (done[name].format is not None)
        assert row.relative_error == done[name].relative_error
        if row.worthwhile:
            assert row.stored_bytes == done[name].stored_bytes
        else:
            assert row.verdict == f"keep dense: {done[name].reason}"


def test_damage_to_a_shared_factor_is_found(family, tmp_path):
    path = tmp_path / "small.safetensors"
    compress(open_checkpoint(family), plan_for(Joint(ranks=(6, 4, 4))), out=path)
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    place = start + header["shared.layers.#.fc.weight/48x40-float32.out_basis"]["data_offsets"][0]
    content[place] ^= 1
    path.write_bytes(content)
    problems = verify(open_checkpoint(path)).problems
    assert any("shared.layers.#.fc.weight" in problem for problem in problems)


TASK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(40, 40, bias=False) for _ in range(2))
        self.middle = nn.Linear(40, 40, bias=False)

    def forward(self, x):  # the second of the group comes first
        return self.layers[0](torch.relu(self.middle(torch.relu(self.layers[1](x)))))

def model():
    return Net()

def calibration_batches():
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(40, 40, generator=random) * torch.rand(40, generator=random) ** 3
    return [torch.randn(64, 40, generator=random) @ mix for _ in range(4)]
"""
PAIR = {
    "version": 1,
    "rules": [
        {"match": "layers.*", "format": "joint", "ranks": [2, 6, 6], "together": "pair"},
        {"match": "middle.*", "format": "svd", "rank": 8},
    ],
}


@pytest.fixture
def net(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    task = load_task(str(tmp_path / "task.py"), NEEDS)
    one, two = siblings(2, out=40, in_=40, rank=8, noise=0.2)
    middle = torch.randn(40, 40, generator=torch.Generator().manual_seed(3))
    tensors = {"layers.0.weight": one / 40, "layers.1.weight": two / 10, "middle.weight": middle}
    save_file(tensors, tmp_path / "net.safetensors")
    return task, tensors, tmp_path / "net.safetensors"


def rebuilt(path, task, tmp_path, name):
    """What compressing with the task or without makes of the net: its dense weights, and what was told of each."""
    out, dense = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-dense.safetensors"
    with open_checkpoint(path) as checkpoint:
        models = None if task is None else Reconstruction(checkpoint, task)
        result = compress(checkpoint, parse_plan(PAIR, "plan"), out=out, reconstruction=models)
    assert all(row.format is not None for row in result.layers)
    with open_checkpoint(out) as small:
        assert verify(small, against=open_checkpoint(path)).problems == ()
        decompress(small, out=dense)
    return load_file(dense), {row.layer.name: row.output_error for row in result.layers}


def test_a_group_is_fitted_for_the_outputs_of_its_members_when_the_first_is_reached(net, tmp_path):
    task, was, path = net
    alone, untold = rebuilt(path, None, tmp_path, "alone")
    found, told = rebuilt(path, task, tmp_path, "behind")
    assert set(untold.values()) == {None}
    x = torch.cat(list(task.calibration_batches()))

    def off(now, name, before, behind):
        wanted = before @ was[name].T
        return float((wanted - behind @ now[name].T).norm() / wanted.norm())

    first, reached = (x @ was["layers.1.weight"].T).relu(), (x @ found["layers.1.weight"].T).relu()
    last = (first @ was["middle.weight"].T).relu()
    assert told["layers.1.weight"] == pytest.approx(off(found, "layers.1.weight", x, x), rel=1e-3)
    # Of the other member no more is known then than what gets there in the dense model.
    assert told["layers.0.weight"] == pytest.approx(off(found, "layers.0.weight", last, last), rel=1e-3)
    # The layer between them is fitted behind the group.
    assert told["middle.weight"] == pytest.approx(off(found, "middle.weight", first, reached), rel=1e-3)
    squares = [
        off(each, "layers.1.weight", x, x) ** 2 + off(each, "layers.0.weight", last, last) ** 2
        for each in (found, alone)
    ]
    assert squares[0] < 0.8 * squares[1]


def test_a_group_member_that_the_model_never_calls_counts_by_its_weight(net, tmp_path):
    _, was, path = net
    (tmp_path / "task.py").write_text(TASK.replace("self.layers[0](", "("))
    found, told = rebuilt(path, load_task(str(tmp_path / "task.py"), NEEDS), tmp_path, "behind")
    assert told["layers.0.weight"] is None
    assert told["layers.1.weight"] < 0.5
    assert (found["layers.0.weight"] - was["layers.0.weight"]).norm() < 0.5 * was["layers.0.weight"].norm()
