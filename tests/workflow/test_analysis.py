"""analyze: errors, bytes and verdicts before anything is written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import NumericalError, UsageError
from tcompress.formats import FORMATS
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.linalg.permutation import unshuffled
from tcompress.workflow.analysis import analyze
from tcompress.workflow.compression import compress
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.planning import Settings


def test_what_analysis_says_is_what_compression_does(model_file, tmp_path):
    for position, choice in enumerate([SVD(rank=4), Sparse(density=0.2), Target(SVD, keep=0.3)]):
        said = analyze(open_checkpoint(model_file), [choice])
        done = compress(open_checkpoint(model_file), plan_for(choice), out=tmp_path / f"{position}.safetensors")
        for row, result in zip(said.rows, done.layers, strict=True):
            assert row.layer == result.layer
            assert row.worthwhile == (result.format is not None)
            if row.worthwhile:
                assert (row.stored_bytes, row.relative_error) == (result.stored_bytes, result.relative_error)


def test_unasked_every_quick_format_is_tried_at_several_budgets(model_file):
    found = analyze(open_checkpoint(model_file))
    quick = [name for name, format_type in FORMATS.items() if format_type.quick]
    assert quick == ["svd", "tt", "ttm", "tucker", "sparse"]
    assert found.asked == tuple(f"{name}:keep={k}" for name in quick for k in ("0.5", "0.25", "0.1"))
    assert len(found.rows) == 5 * len(found.asked)


def test_larger_at_this_rank_is_said_with_the_break_even(model_file):
    found = analyze(open_checkpoint(model_file), [SVD(rank=40)], layers=["fc.*"])
    assert [row.verdict for row in found.rows] == ["keep dense: larger at this rank"]
    assert found.break_even == {"fc.weight": {"svd": SVD(rank=34)}}


def test_settings_come_back_in_the_order_asked(model_file):
    choices = [SVD(rank=2), Sparse(density=0.1), SVD(rank=9), SVD(rank=4)]
    rows = analyze(open_checkpoint(model_file), choices, layers=["fc.weight"]).rows
    assert [row.format for row in rows] == choices
    assert rows[2].relative_error < rows[3].relative_error < rows[0].relative_error


def test_a_glob_that_matches_nothing_lists_what_there_is(model_file):
    with pytest.raises(UsageError, match=r"no layer matches fx.\*; there are .*fc.weight"):
        analyze(open_checkpoint(model_file), layers=["fx.*"])


def test_nan_is_refused_or_passed_over(tmp_path):
    torch.save({"fc.weight": torch.full((30, 30), float("inf"))}, tmp_path / "inf.pt")
    with pytest.raises(NumericalError, match=r"inf.pt: tensor fc.weight: holds 900 values that are NaN or Inf"):
        analyze(open_checkpoint(tmp_path / "inf.pt"))
    found = analyze(open_checkpoint(tmp_path / "inf.pt"), settings=Settings(allow_nonfinite=True))
    assert {row.verdict for row in found.rows} == {"keep dense: holds 900 values that are NaN or Inf"}


def test_a_control_that_cannot_be_fitted_costs_the_figure_alone(tmp_path):
    """In random order these values make one row, whose factor is beyond float16; as they stand they do not."""
    row = torch.zeros(64, 64)
    row[0] = 1e9
    save_file({"a.weight": unshuffled(row, 0)}, tmp_path / "scattered.safetensors")
    settings = Settings(store=torch.float16)
    model = open_checkpoint(tmp_path / "scattered.safetensors")
    (found,) = analyze(model, [SVD(rank=2)], structure=True, settings=settings).rows
    assert found.relative_error is not None
    assert found.structure is None
