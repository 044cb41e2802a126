"""A limit on the file's bytes: what is written never has more, and leaves nothing that it could have used."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress import make_plan, open_checkpoint
from tcompress.errors import LimitError
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.budgeting import choose
from tcompress.workflow.budgets import Budget, points_of
from tcompress.workflow.choices import choices_of
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.settings import Settings
from tcompress.workflow.whole_file import WholeFile
from tests.conftest import FIXTURES

SOURCES = {
    "file": "digits_mlp.safetensors",
    "bf16": "digits_mlp_bf16.safetensors",
    "nested torch": "digits_cnn.pt",
    "tied torch": "digits_mlp_tied.pt",
    "shards": "digits_mlp_sharded",
}
FRACTIONS = (0.05, 0.075, 0.1, 0.133, 0.2, 0.21, 0.3, 0.4, 0.55, 0.8, 1.0)


def source_bytes(checkpoint):
    return sum(path.stat().st_size for path in checkpoint.files)


@pytest.fixture(scope="module", params=SOURCES, ids=lambda name: name.replace(" ", "-"))
def choices(request):
    """All candidates of a fixture, one source after the other."""
    with open_checkpoint(FIXTURES / SOURCES[request.param]) as checkpoint:
        yield choices_of(checkpoint)


def written(choices, planned, out, **options):
    out = out / ("small" if choices.checkpoint.folder is not None else "small.safetensors")
    return compress(choices.checkpoint, planned.plan, out=out, force=True, **options).stored_bytes


def test_no_file_is_larger_than_its_limit(choices, tmp_path):
    for fraction in FRACTIONS:
        most = int(fraction * source_bytes(choices.checkpoint))
        try:
            planned = choose(choices, Budget(max_bytes=most))
        except LimitError:
            continue
        assert dry_run(choices.checkpoint, planned.plan).stored_bytes <= most
        if fraction in (0.133, 0.3):
            assert written(choices, planned, tmp_path) <= most


def test_limits_that_some_choice_just_keeps_are_kept(choices):
    whole = WholeFile(choices, points_of(choices, Budget(max_bytes=0)))
    for one, other in itertools.product(range(3), range(3)):
        most = whole.nbytes(tuple((one if at % 2 else other) % len(curve) for at, curve in enumerate(choices.curves)))
        planned = choose(choices, Budget(max_bytes=most))
        assert dry_run(choices.checkpoint, planned.plan).stored_bytes <= most


def test_no_better_choice_has_as_many_bytes():
    with open_checkpoint(FIXTURES / SOURCES["file"]) as checkpoint:
        choices = choices_of(checkpoint, formats=[SVD, Sparse], settings=Settings(store=torch.int8))
        points = points_of(choices, Budget(max_bytes=0))
        whole = WholeFile(choices, points)
        every = [
            (whole.nbytes(choice), sum(curve[at].loss for curve, at in zip(points, choice, strict=True)))
            for choice in itertools.product(*(range(len(curve)) for curve in points))
        ]
        smallest = min(nbytes for nbytes, _ in every)
        assert smallest == whole.nbytes(whole.smallest.chosen)
        for most in (smallest, *range(smallest + 37, 80000, 4999)):
            planned = choose(choices, Budget(max_bytes=most))
            best = min(loss for nbytes, loss in every if nbytes <= most)
            assert best <= planned.loss * (1 + 1e-9)
            nearly = min(loss for nbytes, loss in every if nbytes <= 0.99 * most or nbytes == smallest)
            assert planned.loss <= nearly * (1 + 1e-9)
        with pytest.raises(LimitError):
            choose(choices, Budget(max_bytes=smallest - 1))


def test_many_layers_leave_less_than_a_hundredth(tmp_path):
    random = torch.Generator().manual_seed(0)
    path = tmp_path / "deep.safetensors"
    save_file({f"{n}.weight": torch.randn(40 + n, 64, generator=random) for n in range(30)}, path)
    with open_checkpoint(path) as checkpoint:
        choices = choices_of(checkpoint, formats=[SVD, Sparse])
        for most in range(40000, 140000, 7919):
            planned = choose(choices, Budget(max_bytes=most))
            assert 0.99 * most < dry_run(checkpoint, planned.plan).stored_bytes <= most


def test_what_cannot_be_is_told_with_the_smallest_that_can(choices):
    with pytest.raises(LimitError) as told:
        choose(choices, Budget(max_bytes=1))
    found = re.search(
        r"keeps within 1 bytes of the whole file; the smallest takes (\d+), --max-bytes (\d+)$", str(told.value)
    )
    assert found is not None
    assert found[1] == found[2]
    planned = choose(choices, Budget(max_bytes=int(found[2])))
    assert dry_run(choices.checkpoint, planned.plan).stored_bytes <= int(found[2])
    with pytest.raises(LimitError, match=f"--max-bytes {found[2]}$"):
        choose(choices, Budget(max_bytes=int(found[2]) - 1))


@pytest.mark.parametrize("name", ["keep", "flops"])
def test_the_smallest_fraction_is_told_that_can_be(choices, name):
    with pytest.raises(LimitError) as told:
        choose(choices, Budget(**{name: 0}))
    least = re.search(rf"keeps within 0 .*; the smallest takes \d+, --{name} ([0-9.]+)$", str(told.value))
    assert least is not None
    assert choose(choices, Budget(**{name: float(least[1])})).loss > 0
    with pytest.raises(LimitError):
        choose(choices, Budget(**{name: 0.998 * float(least[1])}))


def test_shards_and_what_describes_them_count(tmp_path):
    with open_checkpoint(FIXTURES / SOURCES["shards"]) as checkpoint:
        for shard, most in ((2000, 25000), (6000, 25000), (None, 9000)):
            planned = make_plan(checkpoint, max_bytes=most, formats=[Sparse], max_shard_bytes=shard)
            result = compress(checkpoint, planned.plan, out=tmp_path / "s", max_shard_bytes=shard, force=True)
            assert 0.9 * most < result.stored_bytes <= most
            assert result.stored_bytes == sum(
                path.stat().st_size for path in (tmp_path / "s").iterdir() if path.name != "config.json"
            )


def test_zeros_in_a_weight_leave_room_that_is_used(tmp_path):
    tensors = load_file(FIXTURES / SOURCES["file"])
    for tensor in tensors.values():
        tensor[tensor.abs() < tensor.abs().median()] = 0
    save_file(tensors, tmp_path / "zeros.safetensors")
    with open_checkpoint(tmp_path / "zeros.safetensors") as checkpoint:
        planned = make_plan(checkpoint, max_bytes=60000, formats=[Sparse], settings=Settings(store=torch.float32))
        result = compress(checkpoint, planned.plan, out=tmp_path / "small.safetensors")
    assert result.stored_bytes <= 60000
    assert result.largest_error < 0.02
