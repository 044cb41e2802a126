"""Memory of a loaded model with `cache="never"`, beside what it takes on disk.

    python tests/benchmarks/loaded_memory.py [--layers 6] [--size 4096]

Makes a bf16 checkpoint of square linear layers, compresses it in several ways, and loads each, in a process of its own,
into a model on the meta device that runs once, batch 1. Printed are the bytes on disk, the resident memory that the
loaded model keeps and the peak, both beyond `import torch` and the package, and the peak beside the limit: 1.2 x the
stored bytes + one layer in float32 + 32 MB for activations and the allocator.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tcompress import compress, open_checkpoint
from tcompress.checkpoint.dtypes import BY_NAME
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.writer import Piece, write_file
from tcompress.formats import make, parse
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.settings import Settings

MB = 1 << 20
FREE = 32 * MB
CASES = [
    ("svd:rank=256", None),
    ("svd:rank=256", torch.int8),
    ("sparse:density=0.5", None),
    ("sparse:density=0.1", None),
    ("sparse:density=1.0", torch.int8),
    ("sparse:density=1.0", torch.int4),
    ("sparse:density=0.5", torch.int4),
    ("sparse:density=0.5:m=4", None),
    ("low-rank-sparse:rank=64:density=0.1:rounds=3", None),
    ("tt:rank=64", None),
    ("tucker:rank=32", None),
]
RUN = """
import gc, re, sys, torch
from torch import nn
import tcompress.workflow.loading as loading

def status(key):
    return int(re.search(key + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
layers, size = int(sys.argv[2]), int(sys.argv[3])
nn.functional.linear(torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(8, 8, dtype=torch.bfloat16))
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.bfloat16) for _ in range(layers))).eval()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
model = loading.load_into(model, sys.argv[1], cache=sys.argv[4])
gc.collect()
kept = status("VmRSS") - before
with torch.inference_mode():
    model(torch.ones(1, size, dtype=torch.bfloat16))
print(kept, status("VmHWM") - before)
"""


def checkpoint(path: Path, layers: int, size: int) -> None:
    pieces = []
    for number in range(layers):
        generator = torch.Generator().manual_seed(number)
        weight = torch.randn(size, size, generator=generator, dtype=torch.float32).div_(size**0.5).bfloat16()
        pieces.append(
            Piece(f"{number}.weight", BY_NAME["bfloat16"], (size, size), "", lambda weight=weight: bytes_of(weight))
        )
    write_file(path, pieces, {}, None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", type=int, default=4096)
    asked = parser.parse_args()
    one_layer = 4 * asked.size**2
    print("| format | stored | MB | loaded MB | peak MB | of the limit |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        dense, small = Path(folder, "dense.safetensors"), Path(folder, "small.safetensors")
        checkpoint(dense, asked.layers, asked.size)
        for text, store in CASES:
            kind, options = parse(text)
            setting = make(kind, options)
            assert not isinstance(setting, Target)
            with open_checkpoint(dense) as opened:
                compress(opened, plan_for(setting), out=small, force=True, settings=Settings(store=store))
            stored = small.stat().st_size
            arguments = [str(small), str(asked.layers), str(asked.size), "never"]
            done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
            kept, peak = map(int, done.stdout.split())
            limit = 1.2 * stored + one_layer + FREE
            named = "bf16" if store is None else str(store).removeprefix("torch.")
            cells = [text, named, *(f"{n / MB:.0f}" for n in (stored, kept, peak)), f"{100 * peak / limit:.0f} %"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
