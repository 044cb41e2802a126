"""Peak memory of compressing a checkpoint far larger than its largest tensor.

    python tests/benchmarks/memory.py [--gigabytes 3] [--layers 24] [--only TEXT]

Makes a bf16 checkpoint in a temporary folder, compresses it with each format in a process of its own, and prints peak
resident memory beyond what `import torch` takes, beside the limit: 4 x the largest tensor in float32 + 100 MB.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tcompress.checkpoint.dtypes import BY_NAME
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.writer import Piece, write_file

PEAK = "from tcompress.workflow.results import peak_memory_bytes as peak; print(peak())"
IMPORT_TORCH = (
    """import torch, re; print(int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024)"""
)
RUN = (
    f"import sys; from tcompress.cli.app import run; code = run(sys.argv[1:]);{PEAK.replace('print(', 'print(code, ')}"
)
COMMANDS = {
    "compress svd --rank 32": ["compress", "{model}", "--format", "svd", "--rank", "32", "-o", "{small}"],
    "verify --against": ["verify", "{small}", "--against", "{model}"],
    "decompress": ["decompress", "{small}", "-o", "{dense}"],
    "compress tt --rank 32": ["compress", "{model}", "--format", "tt", "--rank", "32", "-o", "{small}"],
    "compress ttm --rank 32": ["compress", "{model}", "--format", "ttm", "--rank", "32", "-o", "{small}"],
    "compress tucker --rank 16": ["compress", "{model}", "--format", "tucker", "--rank", "16", "-o", "{small}"],
    "compress sparse --keep 0.3": ["compress", "{model}", "--format", "sparse", "--keep", "0.3", "-o", "{small}"],
    "compress sparse --keep 0.3 --global": [
        "compress", "{model}", "--format", "sparse", "--keep", "0.3", "--global", "-o", "{small}",
    ],
    "compress sparse --tolerance 0.3": [
        "compress", "{model}", "--format", "sparse", "--tolerance", "0.3", "-o", "{small}",
    ],
    "compress lrs --keep 0.5": ["compress", "{model}", "--format", "lrs:rounds=10", "--keep", "0.5", "-o", "{small}"],
    "compress sparse --keep 0.1 --dtype int4": [
        "compress", "{model}", "--format", "sparse", "--keep", "0.1", "--dtype", "int4", "-o", "{small}",
    ],
    "inspect": ["inspect", "{model}"],
}  # fmt: skip


def make_checkpoint(path: Path, gigabytes: float, layers: int) -> int:
    """Write the checkpoint layer by layer; return the bytes of its largest tensor in float32."""
    width = int(math.sqrt(gigabytes * 1e9 / layers / 2) // 64 * 64)

    def weight(seed: int) -> memoryview:
        generator = torch.Generator().manual_seed(seed)
        low = torch.randn(width, 16, generator=generator) @ torch.randn(16, width, generator=generator)
        return bytes_of((low + torch.randn(width, width, generator=generator)).to(torch.bfloat16))

    names = [f"layers.{number}.weight" for number in range(layers)]
    pieces = [
        Piece(name, BY_NAME["bfloat16"], (width, width), name, lambda seed=seed: weight(seed))  # type: ignore[misc]
        for seed, name in enumerate(names)
    ]
    write_file(path, pieces, {"format": "pt"}, None)
    return width * width * 4


def peak_of(program: str, *arguments: str) -> tuple[int, float]:
    """Return peak resident bytes and seconds of a program, which must end well."""
    started = time.perf_counter()
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, text=True, check=True, stdout=subprocess.PIPE)
    *code, peak = done.stdout.splitlines()[-1].split()
    if code not in ([], ["0"]):
        sys.exit(f"{arguments}: exit code {code}")
    return int(peak), time.perf_counter() - started


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", default="", help="those commands alone that contain this text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model.safetensors")
        largest = make_checkpoint(model, options.gigabytes, options.layers)
        torch_alone, _ = peak_of(IMPORT_TORCH)
        limit = 4 * largest + 100_000_000
        print(f"checkpoint: {model.stat().st_size / 1e9:.2f} GB bf16, {options.layers} layers, largest tensor in")
        print(f"float32 {largest / 1e6:.0f} MB; import torch takes {torch_alone / 1e6:.0f} MB;", end=" ")
        print(f"limit beyond it {limit / 1e6:.0f} MB")
        print(f"{'command':38} {'beyond torch':>14} {'of the limit':>13} {'seconds':>8}  output")
        for label, command in ((label, command) for label, command in COMMANDS.items() if options.only in label):
            paths = {"model": model, "small": Path(folder, "small.safetensors"), "dense": Path(folder, "d.safetensors")}
            arguments = [part.format(**paths) for part in command]
            force = ["--force"] if command[0] in {"compress", "decompress"} else []
            peak, seconds = peak_of(RUN, *arguments, *force)
            beyond = peak - torch_alone
            made = Path(arguments[-1]).stat().st_size / 1e9 if "-o" in arguments else 0
            print(
                f"{label:38} {beyond / 1e6:11.0f} MB {beyond / limit:12.0%} {seconds:8.1f}  {made:.2f} GB", flush=True
            )
            if command[0] == "decompress":
                Path(folder, "d.safetensors").unlink()


if __name__ == "__main__":
    main()
