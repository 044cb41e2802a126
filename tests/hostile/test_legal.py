"""What is odd but legal comes back: every name, every untouched byte, and nothing but finite values."""

from __future__ import annotations

import pytest
import torch

from tcompress.checkpoint.opening import open_checkpoint
from tcompress.formats.svd import SVD
from tcompress.workflow.compression import compress
from tcompress.workflow.decompression import decompress
from tcompress.workflow.plan import Plan, Target, plan_for
from tcompress.workflow.verification import verify
from tests.hostile.case import COMMANDS
from tests.hostile.corpus import CASES
from tests.hostile.corpus_torch import CANARY, calling, in_legacy, in_zip, touch

LEGAL = [name for name, case in CASES.items() if case.expected[COMMANDS[2]][0] == 0]


@pytest.mark.parametrize("name", LEGAL)
def test_it_comes_back_whole(name, tmp_path):
    (tmp_path / "in").mkdir()
    model = CASES[name].build(tmp_path / "in")
    suffix = "" if model.is_dir() else ".safetensors"
    small, back = tmp_path / f"small{suffix}", tmp_path / f"back{suffix}"
    plan: Plan = plan_for(Target(SVD, keep=0.5))
    compress(open_checkpoint(model), plan, out=small)
    result = verify(open_checkpoint(small), against=open_checkpoint(model))
    assert result.problems == ()
    decompress(open_checkpoint(small), out=back)
    before, after = open_checkpoint(model), open_checkpoint(back)
    compressed = {layer.name for layer in result.layers}
    assert set(before) == set(after)
    for tensor, info in before.items():
        assert (after[tensor].shape, after[tensor].dtype) == (info.shape, info.dtype)
        if before.tied.get(tensor, tensor) in compressed:
            assert bool(after.read(tensor).isfinite().all())
        else:
            assert bytes(after.raw(tensor)) == bytes(before.raw(tensor))


@pytest.mark.parametrize("form", [in_zip, in_legacy])
def test_the_code_in_the_pickles_works(form, tmp_path):
    """Were it not so, a canary that never appears would say nothing."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "model.pt").write_bytes(form(calling("os system", touch(tmp_path / "in"))))
    torch.load(tmp_path / "in" / "model.pt", weights_only=False)
    assert (tmp_path / CANARY).exists()
