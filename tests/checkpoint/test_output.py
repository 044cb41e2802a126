"""A result appears complete or not at all; what was there before stays until that moment."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from tcompress.checkpoint.output import Output
from tcompress.errors import InputError, OutputError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out"


def output(path, *, is_folder=False, force=False, inputs=()):
    return Output(path, is_folder=is_folder, force=force, inputs=inputs)


def refusal(path, **options):
    with pytest.raises(OutputError) as caught:
        output(path, **options).check()
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message.removeprefix(f"{path}: ")


def run(out, work):
    with out:
        work(out)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def model(folder):
    folder.mkdir()
    (folder / "model.safetensors").write_text("old")
    return folder


def test_a_file_appears_only_when_it_is_committed(path, tmp_path):
    with output(path) as out:
        out.draft.write_text("new")
        (out.workspace / "spool").write_text("work")
        assert not path.exists()
        assert out.workspace.parent == tmp_path
        out.commit()
        assert path.read_text() == "new"
    assert tree(tmp_path) == ["out"]


def test_a_folder_appears_only_when_it_is_committed(path, tmp_path):
    with output(path, is_folder=True) as out:
        (out.draft / "sub").mkdir()
        (out.draft / "sub" / "file").write_text("new")
        assert not path.exists()
        out.commit()
    assert tree(tmp_path) == ["out", "out/sub", "out/sub/file"]


def test_without_commit_nothing_appears(path, tmp_path):
    with output(path) as out:
        out.draft.write_text("new")
    assert tree(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError("x"), InputError("x"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("is_folder", [False, True])
def test_an_error_leaves_the_old_state_and_nothing_else(path, tmp_path, error, is_folder):
    if is_folder:
        model(path)
    else:
        path.write_text("old")
    before = tree(tmp_path)

    def work(out):
        (out.draft / "file" if is_folder else out.draft).write_text("new")
        raise error

    with pytest.raises(type(error)):
        run(output(path, is_folder=is_folder, force=True), work)
    assert tree(tmp_path) == before
    assert (path / "model.safetensors" if is_folder else path).read_text() == "old"


def test_an_oserror_on_the_way_becomes_an_output_error(path, tmp_path):
    with pytest.raises(OutputError) as caught, output(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")
    assert str(caught.value) == f"{path}: cannot be written (No space left on device)"
    assert isinstance(caught.value.__cause__, OSError)
    assert tree(tmp_path) == []


def test_a_workspace_that_cannot_be_made_is_an_output_error(tmp_path):
    path = tmp_path / ("x" * 250)  # the workspace's own name is longer
    with pytest.raises(OutputError) as caught, output(path):
        pass
    assert str(caught.value) == f"{path}: cannot be written (File name too long)"


@pytest.mark.parametrize("is_folder", [False, True])
def test_what_exists_is_replaced_only_by_force(path, tmp_path, is_folder):
    if is_folder:
        model(path)
    else:
        path.write_text("old")
    problem = "exists already; use --force to replace it, or another -o"
    assert refusal(path, is_folder=is_folder) == problem
    with output(path, is_folder=is_folder, force=True) as out:
        (out.draft / "file" if is_folder else out.draft).write_text("new")
        out.commit()
    assert tree(tmp_path) == (["out", "out/file"] if is_folder else ["out"])
    assert (path / "file" if is_folder else path).read_text() == "new"


def test_what_appeared_in_the_meantime_is_not_replaced(path, tmp_path):
    def work(out):
        out.draft.write_text("slow")
        path.write_text("fast")
        out.commit()

    with pytest.raises(OutputError) as caught:
        run(output(path), work)
    assert str(caught.value) == f"{path}: exists already; use --force to replace it, or another -o"
    assert path.read_text() == "fast"
    assert tree(tmp_path) == ["out"]


def test_a_replacement_that_fails_at_the_last_step_puts_the_old_folder_back(path, tmp_path, monkeypatch):
    def broken_disk(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(source), None, str(target))

    model(path)
    monkeypatch.setattr(Path, "replace", broken_disk)
    with pytest.raises(OutputError) as caught:
        run(output(path, is_folder=True, force=True), Output.commit)
    assert str(caught.value) == f"{path}: cannot be written (Input/output error)"
    assert tree(tmp_path) == ["out", "out/model.safetensors"]


def test_a_file_is_not_replaced_by_a_folder_nor_a_folder_by_a_file(path, tmp_path):
    path.write_text("old")
    assert refusal(path, is_folder=True, force=True) == "is a file; choose another -o"
    folder = model(tmp_path / "folder")
    assert refusal(folder, force=True) == "is a folder; choose another -o"


def test_a_folder_without_checkpoint_is_never_replaced(path):
    path.mkdir()
    (path / "diary.txt").write_text("dear")
    problem = "is a folder without a checkpoint; it is not replaced, choose another -o"
    assert refusal(path, is_folder=True, force=True) == problem


@pytest.mark.parametrize(
    "name", ["a.safetensors", "x.index.json", "tcompress.json", "pytorch_model.bin", "pytorch_model-1-of-2.bin"]
)
def test_a_folder_with_a_checkpoint_or_nothing_is_replaced(path, name):
    path.mkdir()
    output(path, is_folder=True, force=True).check()
    (path / name).touch()
    output(path, is_folder=True, force=True).check()


def test_the_input_is_never_replaced(path, tmp_path):
    problem = "is the input itself or holds it; choose another output"
    path.write_text("weights")
    folder = model(tmp_path / "folder")
    (tmp_path / "link").symlink_to(path)
    assert refusal(path, force=True, inputs=[path]) == problem
    assert refusal(tmp_path / "link", force=True, inputs=[path]) == problem
    assert refusal(path, force=True, inputs=[tmp_path / "link"]) == problem
    assert refusal(folder, is_folder=True, force=True, inputs=[folder / "model.safetensors"]) == problem
    assert refusal(folder, is_folder=True, force=True, inputs=[folder]) == problem
    assert refusal(tmp_path / "folder" / ".." / "folder", is_folder=True, force=True, inputs=[folder]) == problem
    output(folder / "inside", is_folder=True, force=True, inputs=[folder]).check()


def test_a_link_is_replaced_and_not_what_it_leads_to(path, tmp_path):
    folder = model(tmp_path / "folder")
    path.symlink_to(folder)
    with output(path, is_folder=True, force=True) as out:
        (out.draft / "file").write_text("new")
        out.commit()
    assert not path.is_symlink()
    assert tree(tmp_path) == ["folder", "folder/model.safetensors", "out", "out/file"]


def test_a_missing_parent_is_named(tmp_path):
    path = tmp_path / "no" / "out"
    assert refusal(path) == f"the folder {tmp_path / 'no'} does not exist"


def test_a_parent_that_is_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "out") == f"the folder {tmp_path / 'file'} does not exist"


@pytest.mark.skipif(os.geteuid() == 0, reason="everything can be written by root")
def test_a_parent_that_cannot_be_written_to_is_named(path, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert refusal(path) == f"the folder {tmp_path} cannot be written to"
    finally:
        tmp_path.chmod(0o700)


def test_space_that_is_not_there_is_an_error_before_the_work(path):
    free = shutil.disk_usage(path.parent).free
    output(path).require_space(1)
    with pytest.raises(OutputError) as caught:
        output(path).require_space(free + (1 << 50))
    assert str(caught.value).startswith(f"{path}: needs {free + (1 << 50)} bytes, the disk has ")


def test_an_output_can_be_read_by_others_as_the_umask_says(path):
    old = os.umask(0o022)
    try:
        with output(path) as out:
            out.draft.write_text("new")
            out.commit()
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o644
