"""How long a person waits for --version and --help, against `import torch`: python tests/benchmarks/startup.py."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "tcompress --version": [sys.executable, "-m", "tcompress", "--version"],
    "tcompress --help": [sys.executable, "-m", "tcompress", "--help"],
    "tcompress compress --help": [sys.executable, "-m", "tcompress", "compress", "--help"],
}
ROUNDS = 9


def seconds(command: list[str]) -> float:
    """Return the wall time of a process."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Print the table: commands in turn, so that the machine's moods hit all of them."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS + 1):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    print(f"{'command':28} {'median s':>9} {'of import torch':>16}")
    for name, measured in times.items():
        ratios = [ours / torch for ours, torch in zip(measured[1:], times["import torch"][1:], strict=True)]
        print(f"{name:28} {statistics.median(measured[1:]):9.3f} {statistics.median(ratios):16.2f}")


if __name__ == "__main__":
    main()
