"""A journal gives back what was finished, and nothing that is not whole."""

from __future__ import annotations

import json

import pytest
import torch

from tcompress.checkpoint.journal import JOURNAL, SPOOL, Journal
from tcompress.checkpoint.mapped import bytes_of

RUN = {"plan": "svd", "threads": 1}
TENSORS = {
    "left": torch.arange(12.0).reshape(3, 4),
    "half": torch.randn(5, 3).to(torch.bfloat16),
    "codes": torch.arange(7, dtype=torch.uint8),
    "empty": torch.empty(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def steps(journal: Journal, count: int) -> None:
    for number in range(count):
        tensors = [(f"layer{number}.{name}", tensor + number, f"layer{number}") for name, tensor in TENSORS.items()]
        journal.put(f"layer{number}", {"relative_error": 0.1 * number, "why": None}, tensors)


def check(journal: Journal, count: int) -> None:
    assert len(journal) == count
    for number in range(count):
        record = journal[f"layer{number}"]
        assert record.found == {"relative_error": 0.1 * number, "why": None}
        for piece, (name, tensor) in zip(record.pieces, TENSORS.items(), strict=True):
            assert (piece.name, piece.group) == (f"layer{number}.{name}", f"layer{number}")
            assert (piece.shape, piece.dtype.torch) == (tuple(tensor.shape), tensor.dtype)
            assert piece.data() == bytes_of(tensor + number)


def test_what_is_put_in_comes_out_at_once_and_in_the_next_run(tmp_path):
    with Journal(tmp_path, RUN) as journal:
        steps(journal, 3)
        check(journal, 3)
        assert (journal.resumed, journal.restarted) == (0, False)
    with Journal(tmp_path, RUN) as journal:
        assert (journal.resumed, journal.restarted) == (3, False)
        check(journal, 3)
        assert "layer3" not in journal
        journal.put("layer3", {"reason": "no"})
    with Journal(tmp_path, RUN) as journal:
        assert journal["layer3"].found == {"reason": "no"}
        assert journal["layer3"].pieces == ()


@pytest.mark.parametrize("other", [{}, {"plan": "svd", "threads": 2}, {"plan": "tt", "threads": 1}])
def test_another_run_begins_anew(tmp_path, other):
    with Journal(tmp_path, RUN) as journal:
        steps(journal, 2)
    with Journal(tmp_path, other) as journal:
        assert (len(journal), journal.resumed, journal.restarted) == (0, 0, True)
        steps(journal, 1)
    with Journal(tmp_path, other) as journal:
        check(journal, 1)


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def test_a_journal_cut_anywhere_keeps_its_whole_lines(tmp_path):
    with Journal(tmp_path, RUN) as journal:
        steps(journal, 3)
    whole, spool = (tmp_path / JOURNAL).read_bytes(), (tmp_path / SPOOL).read_bytes()
    lines = [len(line) for line in whole.splitlines(keepends=True)]
    ends = [sum(lines[: number + 1]) for number in range(len(lines))]
    for length in range(0, len(whole), 7):
        (tmp_path / SPOOL).write_bytes(spool)
        (tmp_path / JOURNAL).write_bytes(whole[:length])
        expected = max(0, sum(end <= length for end in ends) - 1)
        with Journal(tmp_path, RUN) as journal:
            check(journal, expected)
            for number in range(expected, 3):
                tensors = [(f"layer{number}.{n}", t + number, f"layer{number}") for n, t in TENSORS.items()]
                journal.put(f"layer{number}", {"relative_error": 0.1 * number, "why": None}, tensors)
        with Journal(tmp_path, RUN) as journal:
            check(journal, 3)


def test_a_spool_cut_or_changed_drops_what_lay_there_and_all_after_it(tmp_path):
    with Journal(tmp_path, RUN) as journal:
        steps(journal, 3)
    whole, spool = (tmp_path / JOURNAL).read_bytes(), (tmp_path / SPOOL).read_bytes()
    each = len(spool) // 3
    for position in range(0, len(spool), 5):
        for damaged in (spool[:position], spool[:position] + bytes([spool[position] ^ 1]) + spool[position + 1 :]):
            (tmp_path / JOURNAL).write_bytes(whole)
            (tmp_path / SPOOL).write_bytes(damaged)
            with Journal(tmp_path, RUN) as journal:
                check(journal, position // each)


def test_a_changed_line_is_dropped(tmp_path):
    with Journal(tmp_path, RUN) as journal:
        steps(journal, 2)
    text = (tmp_path / JOURNAL).read_text()
    (tmp_path / JOURNAL).write_text(text.replace('"relative_error":0.1', '"relative_error":0.2'))
    with Journal(tmp_path, RUN) as journal:
        check(journal, 1)


def test_rubbish_is_no_journal(tmp_path):
    for rubbish in (b"", b"\n", b"{}\n", b"\xff\xfe\x00", json.dumps(RUN).encode() + b"\n"):
        (tmp_path / JOURNAL).write_bytes(rubbish)
        (tmp_path / SPOOL).write_bytes(b"x")
        with Journal(tmp_path, RUN) as journal:
            assert len(journal) == 0
        with Journal(tmp_path, RUN) as journal:
            assert not journal.restarted


def test_tensors_without_a_line_are_cut_off_before_others_follow(tmp_path):
    with Journal(tmp_path, RUN) as journal:
        steps(journal, 1)
    with (tmp_path / SPOOL).open("ab") as spool:
        spool.write(b"killed before the line was written")
    with Journal(tmp_path, RUN) as journal:
        check(journal, 1)
        tensors = [(f"layer1.{name}", tensor + 1, "layer1") for name, tensor in TENSORS.items()]
        journal.put("layer1", {"relative_error": 0.1, "why": None}, tensors)
        journal._spool.flush()
        check(journal, 2)
    with Journal(tmp_path, RUN) as journal:
        check(journal, 2)
