"""Two runs on one output: the second is refused, and no dead run blocks anybody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tcompress.checkpoint.lock import lock
from tcompress.checkpoint.output import Output
from tcompress.errors import LockedError

ROOT = Path(__file__).parent.parent.parent
HOLD = (
    "import sys, time; from pathlib import Path; from tcompress.checkpoint.lock import lock;"
    "lock(Path(sys.argv[1]), Path('out')); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_is_refused_by_the_number_of_the_first(holder, tmp_path):
    with pytest.raises(LockedError) as caught:
        lock(tmp_path / "lock", Path("out"))
    assert str(caught.value) == f"out: is being written by another run (process {holder.pid})"
    assert caught.value.exit_code == 75


def test_a_dead_run_holds_nothing(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    handle = lock(tmp_path / "lock", Path("out"))
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    os.close(handle)
    os.close(lock(tmp_path / "lock", Path("out")))


def test_a_refused_run_leaves_the_other_ones_work_alone(tmp_path):
    def output():
        return Output(tmp_path / "out", is_folder=False, force=False, inputs=[])

    with output() as first:
        first.draft.write_text("work")
        with pytest.raises(LockedError), output():
            pass
        assert first.draft.read_text() == "work"
        first.commit()
    assert (tmp_path / "out").read_text() == "work"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
