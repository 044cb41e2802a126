"""analyze: errors, bytes and verdicts before anything is written."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import NumericalError, UsageError
from tcompress.formats import FORMATS
from tcompress.formats.sparse import Sparse
from tcompress.formats.sparse_product import SparseProduct
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.linalg.permutation import unshuffled
from tcompress.workflow.analysis import analyze, winners
from tcompress.workflow.compression import compress
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.results import AnalysisRow
from tcompress.workflow.settings import Settings


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
    assert quick == ["svd", "tt", "ttm", "tucker", "sparse", "low-rank-sparse"]
    assert found.asked == tuple(f"{name}:keep={k}" for name in quick for k in ("0.5", "0.25", "0.1"))
    assert len(found.rows) == len(found.layers) * len(found.asked)


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


@pytest.fixture
def planted(tmp_path):
    """Weights that one family describes exactly and the other does not."""
    generator = torch.Generator().manual_seed(2)
    low = torch.randn(64, 4, generator=generator) @ torch.randn(4, 64, generator=generator)
    sparse = torch.randn(64, 64, generator=generator) * (torch.rand(64, 64, generator=generator) < 0.1)
    save_file({"low.weight": low, "sparse.weight": sparse}, tmp_path / "planted.safetensors")
    return tmp_path / "planted.safetensors"


def test_the_best_at_equal_bytes_is_what_was_planted(planted):
    choices = [Target(kind, keep=keep) for kind in (Sparse, SVD) for keep in (0.5, 0.25)]
    found = analyze(open_checkpoint(planted), choices)
    assert [(w.layer.name, w.keep, w.family, w.row.asked) for w in found.best] == [
        ("low.weight", 0.5, "low-rank", "svd:keep=0.5"),
        ("low.weight", 0.25, "low-rank", "svd:keep=0.25"),
        ("sparse.weight", 0.5, "sparse", "sparse:keep=0.5"),
        ("sparse.weight", 0.25, "sparse", "sparse:keep=0.25"),
    ]
    assert all(winner.row in found.rows for winner in found.best)


def test_one_family_or_different_amounts_are_no_contest(planted):
    model = open_checkpoint(planted)
    assert analyze(model, [Target(SVD, keep=0.5), Target(TT, keep=0.5)]).best == ()
    assert analyze(model, [Target(SVD, keep=0.5), Target(Sparse, keep=0.25)]).best == ()
    assert analyze(model, [SVD(rank=4), Sparse(density=0.1)]).best == ()


def rows_of(layer, *figures):
    return [
        AnalysisRow(layer, asked, None, stored, error, 0.0, "", worthwhile=error is not None)
        for asked, error, stored in figures
    ]


def test_ties_go_to_fewer_bytes_and_then_to_the_first_asked(planted):
    layer = analyze(open_checkpoint(planted), [SVD(rank=1)]).layers[0]
    choices = [Target(SVD, keep=0.5), Target(TT, keep=0.5), Target(Sparse, keep=0.5)]
    for figures, best in [
        ([(0.2, 10), (0.2, 10), (0.2, 10)], ["svd:keep=0.5"]),
        ([(0.2, 10), (0.2, 10), (0.2, 9)], ["sparse:keep=0.5"]),
        ([(None, None), (0.3, 9), (0.2, 10)], ["sparse:keep=0.5"]),
        ([(None, None), (None, None), (None, None)], []),
    ]:
        rows = rows_of(layer, *((str(choice), *each) for choice, each in zip(choices, figures, strict=True)))
        assert [winner.row.asked for winner in winners(choices, rows)] == best


def test_a_format_of_both_kinds_and_one_of_neither_are_families_of_their_own(planted):
    class Both(SVD):
        name = "low-rank-sparse"

    layer = analyze(open_checkpoint(planted), [SVD(rank=1)]).layers[0]
    choices = [Target(Both, keep=0.5), Target(SVD, keep=0.5), Target(SparseProduct, keep=0.5)]
    for errors, family in [((0.1, 0.2, 0.3), "low-rank + sparse"), ((0.3, 0.2, 0.1), "sparse-product")]:
        rows = rows_of(layer, *((str(choice), error, 1) for choice, error in zip(choices, errors, strict=True)))
        assert [winner.family for winner in winners(choices, rows)] == [family]
