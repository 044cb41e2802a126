"""How fast factors are encoded and decoded, beside a plain copy of the dense matrix.

    python tests/benchmarks/encodings.py [--size 4096] [--threads 1]

"clone" is torch.Tensor.clone of the dense matrix; "of clone" is its time over that of decoding, 1 being a copy's speed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from tcompress.encodings import find
from tcompress.encodings.elias_fano import best_low_bits
from tcompress.linalg.magnitude import keep_in_groups, keep_largest

CODINGS = [
    ("bitmask", None), ("elias-fano", None), ("csr", None), ("delta8", None),
    ("bitmask", "int8"), ("bitmask", "int4"), ("bitmask", "int3"), ("elias-fano", "int3"), ("2:4", None),
]  # fmt: skip
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def clock(run: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense = torch.randn(options.size, options.size, generator=torch.Generator().manual_seed(0))
    print("| type | density | encoding | bytes of dense | clone ms | encode ms | decode ms | of clone |")
    print("|---|---|---|---|---|---|---|---|")
    for name, dtype in TYPES.items():
        for density in (0.1, 0.5):
            for encoding, values in CODINGS:
                if encoding == "2:4" and density != 0.5:
                    continue
                kept = (
                    keep_in_groups(dense, 2, 4)
                    if ":" in encoding
                    else keep_largest(dense, int(density * dense.numel()))
                )
                factor = kept.to(torch.float32 if values else dtype)
                stored_name = encoding
                if encoding == "elias-fano":
                    stored_name += f":{best_low_bits(factor.numel(), int(factor.count_nonzero()))}"
                coding = find(stored_name, values)
                assert coding is not None
                clone = clock(lambda f=factor: f.clone())
                parts = coding.encode(factor)
                encode = clock(lambda c=coding, f=factor: c.encode(f), 2)
                decode = clock(lambda c=coding, p=parts, f=factor: c.decode(p, tuple(f.shape)))
                nbytes = sum(part.nbytes for part in parts.values()) / (factor.numel() * dtype.itemsize)
                label = f"{encoding} {values}" if values else encoding
                print(
                    f"| {name} | {density} | {label} | {nbytes:.3f} | {1e3 * clone:.1f} "
                    f"| {1e3 * encode:.1f} | {1e3 * decode:.1f} | {clone / decode:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
