"""Commands run one by one as children of a process that has imported everything: a start takes milliseconds.

Each child has an empty folder to work in, little memory and little time; what it does to the files is seen here.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
MEMORY = (
    4 << 30
)  # of address space; a torch with CUDA has more than that before it does anything: then beside what it has
SECONDS = 15
PEAK_BYTES = 2 << 30
FROM_COMMAND = {0, 2, 3, 4, 5, 6, 7, 8}  # documented, and not a signal's or an internal error's
CRASHED = 99


@dataclass(frozen=True)
class Ran:
    """What a command did; ``code`` is below zero when a signal ended it."""

    code: int
    out: str
    err: str
    seconds: float
    peak_bytes: int


class Runner:
    """The process whose children run commands."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        for name in ("FORCE_COLOR", "COLUMNS", "NO_COLOR", "TTY_COMPATIBLE"):
            environment.pop(name, None)
        command = [sys.executable, "-m", "tests.hostile.runner"]
        self._server = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == {"ready": True}

    def run(self, arguments: list[str], *, work: Path, home: Path, scratch: Path, log: Path) -> Ran:
        """Run one command in ``work``, with its HOME and TMPDIR; ``log`` gets its two streams."""
        request = {name: str(path) for name, path in (("work", work), ("home", home), ("scratch", scratch))}
        out, err = log / "out", log / "err"
        request |= {"arguments": arguments, "out": str(out), "err": str(err)}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer = self._answer()
        texts = [path.read_bytes().decode() for path in (out, err)]
        return Ran(answer["code"], texts[0], texts[1], answer["seconds"], answer["peak_bytes"])

    def close(self) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=10)

    def _answer(self) -> dict:
        line = self._server.stdout.readline()
        assert line, "the process that runs the commands has ended"
        return json.loads(line)


def tree_of(folder: Path) -> dict[str, tuple]:
    """Return everything below a folder: its type, its permissions, its content or where it points."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content = None
        if stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(folder))] = (status.st_mode, content)
    return found


def objections(ran: Ran) -> list[str]:
    """Return what no command may do, whatever its input."""
    said = []
    if ran.code not in FROM_COMMAND:
        said.append(f"exit code {ran.code}")
    if ran.peak_bytes > PEAK_BYTES:
        said.append(f"took {ran.peak_bytes >> 20} MiB")
    if ran.seconds > SECONDS:
        said.append(f"took {ran.seconds:.0f} s")
    for name, text in (("stdout", ran.out), ("stderr", ran.err)):
        raw = sorted({character for character in text if character != "\n" and not character.isprintable()})
        if raw:
            said.append(f"{name} has raw {raw}")
        # Runners of CI obey such lines, and look behind the spaces before them.
        said += [f"{name} commands {line!r}" for line in text.split("\n") if line.lstrip().startswith(("::", "##"))]
        said += [f"{name} has a traceback"] * ("Traceback" in text)
    if ran.code == 0 and ran.err:
        said.append("stderr is not empty")
    lines = ran.err.splitlines()
    if ran.code and (len(lines) != 1 or not lines[0].startswith("error: ") or not ran.err.endswith("\n")):
        said.append(f"stderr is not one line: {ran.err[:2000]!r}")
    return said


def serve() -> None:
    """Answer requests on stdin until it closes."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    _warm_up()
    gc.collect()
    gc.freeze()  # objects that no collection touches stay shared with the children
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "only a process of one thread may fork"
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            _child(request)
        code, usage = _wait(child)
        answer = {"code": code, "seconds": time.perf_counter() - started, "peak_bytes": usage.ru_maxrss << 10}
        print(json.dumps(answer), file=answers, flush=True)


def _warm_up() -> None:
    import torch  # noqa: PLC0415 - for the process that runs commands alone
    from safetensors.torch import save_file  # noqa: PLC0415

    from tcompress.cli.app import run  # noqa: PLC0415

    torch.set_num_threads(1)
    sys.argv = ["tcompress"]
    with tempfile.TemporaryDirectory() as folder:
        model, small = f"{folder}/m.safetensors", f"{folder}/s.safetensors"
        save_file({"fc.weight": torch.eye(64)}, model)
        torch.save({"fc.weight": torch.eye(64)}, f"{folder}/m.pt")
        fit = ["--format", "svd", "--rank", "2"]
        assert run(["compress", model, *fit, "-o", small]) == 0
        assert run(["analyze", f"{folder}/m.pt", "--no-structure", *fit]) == 0
        assert run(["decompress", small, "-o", f"{folder}/d.safetensors"]) == 0
        assert run(["verify", small]) == 0
        assert run(["inspect", small]) == 0


def _child(request: dict) -> None:
    code = CRASHED
    try:
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.chdir(request["work"])
        os.environ.update(HOME=request["home"], TMPDIR=request["scratch"], XDG_CACHE_HOME=request["home"])
        tempfile.tempdir = None
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        memory = max(MEMORY, taken + (MEMORY >> 1))
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        from tcompress.cli.app import run  # noqa: PLC0415

        code = run(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - whatever it is, it must not run on as the parent
        traceback.print_exc()
    finally:
        os._exit(code)


def _wait(child: int) -> tuple[int, resource.struct_rusage]:
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], SECONDS)[0]:
        signal.pidfd_send_signal(ended, signal.SIGKILL)
    os.close(ended)
    _, status, usage = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), usage


if __name__ == "__main__":
    serve()
