"""A stopped run goes on; a run whose input, plan or settings changed does not; an input that changes is an error."""

from __future__ import annotations

import errno
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.output import Output
from tcompress.errors import InputError, LockedError, OutputError
from tcompress.formats.joint import Joint
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow import packing
from tcompress.workflow.compression import compress
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.settings import Settings
from tests.conftest import FIXTURES

CHOICES = {
    "rank": SVD(rank=3),
    "keep": Target(SVD, keep=0.4),
    "searched": Target(LowRankSparse, {"share": "auto", "rounds": 4}, keep=0.4),
    "tolerance": Target(Sparse, tolerance=0.3),
    "sparse": Sparse(density=0.2),
    "joint": Joint(ranks=(2, 3, 3)),
}


@pytest.fixture
def model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{n}.weight": torch.randn(40, 50, generator=generator) for n in range(6)}, path)
    return path


class StopAt:
    """Raise an error in place of a fit, the given number of fits later."""

    def __init__(self, monkeypatch, steps, error):
        self.left, self.error, self.fits = steps, error, 0
        for name in ("fit", "fit_shared"):
            monkeypatch.setattr(packing, name, self.around(getattr(packing, name)))

    def around(self, original):
        def fit(*arguments, **options):
            if self.left == 0:
                raise self.error
            self.left -= 1
            self.fits += 1
            return original(*arguments, **options)

        return fit


def stopped(model, choice, out, steps, *, error=None, settings=None):
    error = error or KeyboardInterrupt()
    checkpoint = open_checkpoint(model)
    with pytest.MonkeyPatch.context() as patch:
        StopAt(patch, steps, error)
        with pytest.raises((type(error), OutputError)) as caught:
            compress(checkpoint, plan_for(choice), out=out, settings=settings)
    return caught.value


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(model, tmp_path, monkeypatch, name, steps):
    choice = CHOICES[name]
    if name == "joint":
        model, steps = FIXTURES / "compressed" / "shared_bases.safetensors", 1
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    first = compress(open_checkpoint(model), plan_for(choice), out=whole)
    error = stopped(model, choice, out, steps)
    assert error.__notes__ == [
        f"the same command goes on with what is finished; or delete {tmp_path / '.out.safetensors.partial'}"
    ]
    assert not out.exists()
    counter = StopAt(monkeypatch, -1, None)
    second = compress(open_checkpoint(model), plan_for(choice), out=out)
    assert out.read_bytes() == whole.read_bytes()
    assert counter.fits == len({row.layer.name for row in first.layers}) - steps if name != "joint" else 1
    assert ".out.safetensors.partial" not in names(tmp_path)
    assert [(row.layer, row.format, row.relative_error, row.stored_bytes) for row in first.layers] == [
        (row.layer, row.format, row.relative_error, row.stored_bytes) for row in second.layers
    ]
    assert "went on from" in second.notes[0]


def test_a_searched_setting_is_not_searched_again(model, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    stopped(model, CHOICES["searched"], out, 0)
    monkeypatch.setattr(LowRankSparse, "best_within", lambda *_, **__: pytest.fail("searched again"))
    compress(open_checkpoint(model), plan_for(CHOICES["searched"]), out=out)


def other_input(model):
    tensors = load_file(model)
    tensors["layers.0.weight"] += 1
    save_file(tensors, model)


@pytest.mark.parametrize("change", ["input", "plan", "store", "threads"])
def test_a_run_that_differs_begins_anew_and_says_so(model, tmp_path, change, monkeypatch):
    out, choice, settings = tmp_path / "out.safetensors", SVD(rank=3), Settings()
    stopped(model, choice, out, 3)
    if change == "input":
        other_input(model)
    if change == "plan":
        choice = SVD(rank=4)
    if change == "store":
        settings = Settings(store=torch.bfloat16)
    if change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    result = compress(open_checkpoint(model), plan_for(choice), out=out, settings=settings)
    assert result.notes == ("what an unfinished run with other settings had left was thrown away",)
    whole = tmp_path / "whole.safetensors"
    compress(open_checkpoint(model), plan_for(choice), out=whole, settings=settings)
    assert out.read_bytes() == whole.read_bytes()


def test_what_a_kill_left_half_written_is_swept(model, tmp_path):
    out, workspace = tmp_path / "out.safetensors", tmp_path / ".out.safetensors.partial"
    stopped(model, SVD(rank=3), out, 2)
    (workspace / "draft.safetensors").write_text("half")
    (workspace / "folder").mkdir()
    (workspace / "folder" / "file").write_text("half")
    compress(open_checkpoint(model), plan_for(SVD(rank=3)), out=out)
    assert names(tmp_path) == ["model.safetensors", "out.safetensors"]


def test_an_output_that_a_kill_had_put_aside_comes_back(tmp_path):
    out = tmp_path / "out"
    workspace = tmp_path / ".out.partial"
    (workspace / "replaced").mkdir(parents=True)
    (workspace / "replaced" / "model.safetensors").write_text("old")
    with Output(out, is_folder=True, force=True, inputs=[]):
        assert (out / "model.safetensors").read_text() == "old"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MemoryError(), ValueError("bug")])
def test_other_errors_leave_nothing_behind(model, tmp_path, error):
    stopped(model, SVD(rank=3), tmp_path / "out.safetensors", 3, error=error)
    assert names(tmp_path) == ["model.safetensors"]


def test_an_input_that_changes_during_the_run_is_an_error(model, tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    original = packing.fit

    def fit(*arguments, **options):
        os.utime(model, ns=(1, 1))
        return original(*arguments, **options)

    monkeypatch.setattr(packing, "fit", fit)
    with pytest.raises(InputError, match="was changed while it was read; run again"):
        compress(open_checkpoint(model), plan_for(SVD(rank=3)), out=out)
    assert names(tmp_path) == ["model.safetensors"]


def test_an_input_that_is_cut_short_during_the_run_is_an_error_and_no_crash(tmp_path):
    model, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file({f"layers.{n}.weight": torch.randn(700, 700) for n in range(3)}, model)
    checkpoint = open_checkpoint(model)
    weight = checkpoint.read("layers.2.weight")
    os.truncate(model, 1000)
    assert weight.isfinite().all(), "what was read stays"
    with pytest.raises(InputError, match="shorter now"):
        compress(checkpoint, plan_for(SVD(rank=3)), out=out)
    with pytest.raises(InputError, match="shorter now"):
        checkpoint.read("layers.2.weight")


def test_an_input_that_vanishes_during_the_run_is_an_error(model, tmp_path, monkeypatch):
    original = packing.fit

    def fit(*arguments, **options):
        model.unlink(missing_ok=True)
        return original(*arguments, **options)

    monkeypatch.setattr(packing, "fit", fit)
    with pytest.raises(InputError, match="has vanished while it was read"):
        compress(open_checkpoint(model), plan_for(SVD(rank=3)), out=tmp_path / "out.safetensors")
    assert names(tmp_path) == []


def test_a_second_run_on_the_same_output_is_refused(model, tmp_path):
    out = tmp_path / "out.safetensors"
    with Output(out, is_folder=False, force=False, inputs=[]), pytest.raises(LockedError):
        compress(open_checkpoint(model), plan_for(SVD(rank=3)), out=out)


def test_a_signal_is_what_a_person_presses(tcompress, model, tmp_path):
    original = packing.fit

    def fit(*arguments, **options):
        if (tmp_path / ".o.safetensors.partial" / "spool").stat().st_size:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "fit", fit)
        answer = tcompress("compress", model, "--format", "svd:rank=3", "-o", "o.safetensors")
    assert answer.code == 143
    assert answer.err.endswith("; the same command goes on with what is finished; or delete .o.safetensors.partial\n")
    answer = tcompress("compress", model, "--format", "svd:rank=3", "-o", "o.safetensors")
    assert answer.code == 0
    assert "went on from 1 finished steps" in answer.out
