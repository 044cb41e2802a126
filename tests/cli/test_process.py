"""What only a process of its own shows: start-up time, signals, closed pipes, terminals."""

from __future__ import annotations

import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

TCOMPRESS = [sys.executable, "-m", "tcompress"]
ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*arguments, **options):
    return subprocess.run([*TCOMPRESS, *map(str, arguments)], env=ENVIRONMENT, text=True, check=False, **options)


def test_help_and_version_do_not_load_torch():
    program = (
        "import sys; from tcompress.cli.app import run; run(sys.argv[1:]);"
        "print(sorted({'torch', 'numpy', 'scipy', 'safetensors'} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["--version"], ["--help"], ["compress", "--help"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, env=ENVIRONMENT, text=True, check=True, capture_output=True)
        assert done.stderr == "[]\n"


def test_the_version_is_printed():
    assert re.fullmatch(r"tcompress \d+\.\d+\.\d+\n", run("--version", capture_output=True).stdout)


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    """Layers enough that a run is still busy when the signal comes."""
    tensors = {f"layers.{n}.weight": torch.randn(1200, 1200) for n in range(12)}
    save_file(tensors, tmp_path / "slow.safetensors")
    return tmp_path / "slow.safetensors"


# Background jobs of a shell ignore SIGINT, and so would the tests' children when the tests are one.
INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from tcompress.cli.app import run; sys.exit(run(sys.argv[1:]))"
)


def catches_sigterm(process: subprocess.Popen[str], _: Path) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = re.findall(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def has_a_workspace(_: subprocess.Popen[str], folder: Path) -> bool:
    return any(path.suffix == ".partial" for path in folder.iterdir())


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", [catches_sigterm, has_a_workspace], ids=["while importing", "while working"])
def test_a_signal_stops_the_run_and_says_what_it_leaves(slow_model, tmp_path, sent, code, moment):
    options = ["--format", "svd", "--rank", "500", "-o", str(tmp_path / "o.safetensors")]
    command = [sys.executable, "-c", INTERRUPTIBLE, "compress", str(slow_model), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline and not moment(process, tmp_path):
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(sent)
    sent_at = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert time.monotonic() - sent_at < 5
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    left = {path.name for path in tmp_path.iterdir()} - {"slow.safetensors"}
    assert left <= {".o.safetensors.partial"}
    assert ("the same command goes on" in said) == bool(left)
    assert ("nothing was written" in said) != bool(left)


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    save_file({f"layer{n}.weight": torch.randn(20, 20) for n in range(2000)}, tmp_path / "m.safetensors")
    command = f"{sys.executable} -m tcompress inspect {tmp_path / 'm.safetensors'} | head -1"
    done = subprocess.run(command, shell=True, env=ENVIRONMENT, text=True, check=True, capture_output=True)
    assert done.stdout.startswith("tensor")
    assert done.stderr == ""


def test_progress_is_shown_on_a_terminal_and_only_there(model_file, tmp_path):
    arguments = [*TCOMPRESS, "compress", str(model_file), "--format", "svd", "--rank", "2"]
    quiet = subprocess.run(
        [*arguments, "-o", "a.safetensors"], env=ENVIRONMENT, cwd=tmp_path, capture_output=True, check=True
    )
    assert quiet.stderr == b""
    assert b"\x1b" not in quiet.stdout
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen(
        [*arguments, "-o", "b.safetensors"], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    shown = _read_all(ours)
    assert process.wait() == 0
    assert "layer 5 of 5" in shown


def _read_all(terminal: int) -> str:
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    return shown.decode(errors="replace")


def test_no_color_is_honoured(model_file):
    ours, theirs = pty.openpty()
    environment = {**ENVIRONMENT, "TERM": "xterm-256color", "NO_COLOR": "1", "COLUMNS": "150"}
    command = [*TCOMPRESS, "inspect", str(model_file)]
    process = subprocess.Popen(command, env=environment, stdout=theirs, stderr=subprocess.DEVNULL)
    os.close(theirs)
    shown = _read_all(ours)
    assert process.wait() == 0
    assert "fc.weight" in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", shown)


def test_completion_knows_the_commands():
    environment = {
        **ENVIRONMENT,
        "_TCOMPRESS_COMPLETE": "complete_bash",
        "COMP_WORDS": "tcompress de",
        "COMP_CWORD": "1",
    }
    program = "import sys; sys.argv[0] = 'tcompress'; from tcompress.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, check=False, capture_output=True)
    assert done.stdout.split() == ["decompress"]


def test_an_internal_error_is_one_line_and_debug_shows_the_rest(tmp_path):
    program = (
        "import sys, tcompress.workflow.inspection as i\n"
        "def broken(c): raise ZeroDivisionError('oops')\n"
        "i.inspect = broken\n"
        "from tcompress.cli.app import run\n"
        "sys.exit(run(sys.argv[1:]))"
    )
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    for debug, lines in (([], 1), (["--debug"], 5)):
        command = [sys.executable, "-c", program, *debug, "inspect", str(tmp_path / "m.safetensors")]
        done = subprocess.run(command, env=ENVIRONMENT, text=True, check=False, capture_output=True)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == "error: internal error: ZeroDivisionError: oops; --debug shows more"
        assert len(done.stderr.splitlines()) >= lines
        assert ("Traceback" in done.stderr) == bool(debug)


def limit_files(nbytes):
    """Make every write beyond so many bytes of a file fail, as a full disk would."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))

    return limit


@pytest.mark.parametrize("nbytes", [100, 20_000, 1_000_000], ids=["journal", "first layer", "later layer"])
def test_a_disk_that_is_full_is_one_line_and_leaves_the_old_state(slow_model, tmp_path, nbytes):
    (tmp_path / "o.safetensors").write_text("old")
    options = ["--format", "svd", "--rank", "10", "--force", "-o", tmp_path / "o.safetensors"]
    done = run("compress", slow_model, *options, capture_output=True, preexec_fn=limit_files(nbytes))
    assert done.returncode == 7
    assert done.stderr == f"error: {tmp_path / 'o.safetensors'}: cannot be written (File too large)\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.safetensors", "slow.safetensors"]
    assert (tmp_path / "o.safetensors").read_text() == "old"


def test_no_command_opens_a_connection(tcompress, model_file, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("a connection was asked for")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    assert tcompress("inspect", model_file).code == 0
    assert tcompress("analyze", model_file, "--format", "svd:rank=2").code == 0
    assert tcompress("compress", model_file, "--format", "svd:rank=2", "-o", "s.safetensors").code == 0
    assert tcompress("verify", "s.safetensors", "--against", model_file).code == 0
    assert tcompress("decompress", "s.safetensors", "-o", "d.safetensors").code == 0


@pytest.mark.parametrize("command", ["analyze", "compress", "decompress"])
def test_more_memory_than_allowed_is_refused_before_the_work(tcompress, model_file, command):
    assert tcompress("compress", model_file, "--format", "svd:rank=2", "-o", "s.safetensors").code == 0
    options = {
        "analyze": [model_file],
        "compress": [model_file, "--format", "svd:rank=2", "-o", "o.safetensors"],
        "decompress": ["s.safetensors", "-o", "o.safetensors"],
    }[command]
    assert tcompress(command, *options, "--max-memory", "1MB").code == 0
    if Path("o.safetensors").exists():
        Path("o.safetensors").unlink()
    answer = tcompress(command, *options, "--max-memory", "10KB")
    assert answer.code == 5
    assert re.fullmatch(r"error: \S+: tensor \S+: .* --max-memory is 10000\n", answer.err)
    assert not Path("o.safetensors").exists()
