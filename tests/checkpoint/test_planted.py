"""A workspace that came with somebody's files: what its links lead to stays as it is, and nothing of ours is lost."""

from __future__ import annotations

import pytest

from tcompress.checkpoint.journal import JOURNAL, SPOOL, Journal
from tcompress.checkpoint.output import Output
from tcompress.errors import OutputError


def output(tmp_path, *, is_folder=False):
    return Output(tmp_path / "out", is_folder=is_folder, force=True, inputs=[])


@pytest.fixture
def precious(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear")
    return folder


def test_a_workspace_that_is_a_link_is_refused(tmp_path, precious):
    (tmp_path / ".out.partial").symlink_to(precious)
    with pytest.raises(OutputError, match="partial is a link"), output(tmp_path):
        pass
    assert [path.name for path in precious.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize("name", ["lock", JOURNAL, SPOOL, "draft"])
def test_a_link_inside_leads_nowhere(tmp_path, precious, name):
    workspace = tmp_path / ".out.partial"
    workspace.mkdir()
    (workspace / name).symlink_to(precious / "diary.txt")
    try:
        with output(tmp_path) as out, Journal(out.workspace, {}) as journal:
            journal.put("a", {})
            out.draft.write_text("new")
            out.commit()
    except OutputError:
        assert name == "lock"
    assert (precious / "diary.txt").read_text() == "dear"


def test_only_our_own_leftovers_are_swept(tmp_path):
    workspace = tmp_path / ".out.partial"
    (workspace / "draft").mkdir(parents=True)
    (workspace / "notes.txt").write_text("mine")
    with output(tmp_path):
        assert sorted(path.name for path in workspace.iterdir()) == ["lock", "notes.txt"]


def test_what_was_put_aside_comes_back_whatever_stops_the_run(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_text("old")

    def stopped():
        with output(tmp_path, is_folder=True) as out:
            folder.rename(out.workspace / "replaced")  # and the signal comes before the next step
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (folder / "model.safetensors").read_text() == "old"


def test_a_journal_line_of_another_shape_is_no_record(tmp_path):
    with Journal(tmp_path, {}) as journal:
        for line in ({"key": "a"}, {"tensors": [{}]}, [], 7, {"key": 1, "found": 2, "tensors": [3]}):
            journal._write(line)
    with Journal(tmp_path, {}) as journal:
        assert len(journal) == 0
