"""Kills `tcompress compress` at random moments, again and again, and lets it go on; prints a JSON line for each trial.

    python trials.py MODEL FOLDER TRIALS SEED [--force] -- OPTIONS OF COMPRESS

A process of its own: it loads everything once and forks each run, so that a trial takes no longer than its work.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from tcompress.cli.app import run

torch.set_num_threads(1)


def start(command: list[str], log: Path) -> int:
    """Fork a run of the command line; its words go to a file."""
    child = os.fork()
    if child:
        return child
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os._exit(run(command))


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(path: Path) -> str | None:
    """Return a digest of a file, or of all files of a folder with their names; None when there is nothing."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        return json.dumps([[str(each.relative_to(path)), content(each)] for each in files])
    return None


def main() -> None:
    model, folder, trials, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    options = sys.argv[sys.argv.index("--") + 1 :]
    replaces = "--force" in sys.argv[: sys.argv.index("--")]
    chance, log = random.Random(seed), folder / "log"
    suffix = "" if model.is_dir() else ".safetensors"

    def command(out: Path, *more: str) -> list[str]:
        return ["compress", str(model), "-o", str(out), *options, *more]

    started = time.perf_counter()
    whole = folder / f"whole{suffix}"
    assert finish(start(command(whole), log)) == 0, log.read_text()
    duration, right = time.perf_counter() - started, content(whole)
    for trial in range(trials):
        own = folder / f"trial{trial}"
        own.mkdir()
        out = own / f"out{suffix}"
        old = None
        if replaces:
            assert finish(start(["compress", str(model), "-o", str(out), "--format", "svd", "--rank", "1"], log)) == 0
            old = content(out)
        kills, states = chance.choice([1, 1, 2]), []
        for _ in range(kills):
            child = start(command(out, "--force"), log)
            time.sleep(chance.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
            finish(child)
            states.append({right: "new", old: "old"}.get(content(out), "broken"))
        code = finish(start(command(out, "--force"), log))
        said = log.read_text()
        print(
            json.dumps(
                {
                    "states": states,
                    "code": code,
                    "same": content(out) == right,
                    "left": sorted(path.name for path in own.iterdir() if path != out),
                    "went_on": "went on from" in said,
                    "said": said[-300:],
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
