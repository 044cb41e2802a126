"""An input that changes during a run is noticed, whatever is done to hide it."""

from __future__ import annotations

import os

import pytest

from tcompress.checkpoint.unchanged import Witness
from tcompress.errors import InputError


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"weights")
    return path


def refusal(witness, is_same=None):
    with pytest.raises(InputError) as caught:
        witness.require_unchanged(is_same)
    return str(caught.value)


def test_files_that_stay_are_unchanged(file):
    Witness.of([file]).require_unchanged(lambda: pytest.fail("nothing to ask"))
    file.read_bytes()
    Witness.of([file]).require_unchanged()


def test_a_write_another_file_and_a_missing_one_are_noticed(file, tmp_path):
    witness = Witness.of([file])
    file.write_bytes(b"longer weights")
    assert refusal(witness) == f"{file}: was changed while it was read; run again"
    witness = Witness.of([file])
    (tmp_path / "new").write_bytes(b"longer weights")
    (tmp_path / "new").rename(file)
    assert "was changed" in refusal(witness)
    witness = Witness.of([file])
    file.unlink()
    assert refusal(witness) == f"{file}: has vanished while it was read (No such file or directory)"


def test_where_only_the_status_changed_the_content_decides(file):
    witness, before = Witness.of([file]), file.stat()
    file.write_bytes(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "was changed" in refusal(witness, lambda: False)
    witness = Witness.of([file])
    file.chmod(0o600)
    witness.require_unchanged(lambda: True)
    witness.require_unchanged()
