"""In rounds or at once: finetune --method iterate against compress and finetune, at the same ranks and epochs.

    python tests/benchmarks/iterating.py [--rounds 2,4] [--epochs 8] [--seeds 0,1,2] [--weakening 0.5]
        [--towards dense] [--layers N] [--data DIR]

LeNet-300-100 on MNIST with tasks/lenet300.py. For each number of rounds and each seed: the dense model through
iterate, then, at once, svd of the ranks that the last round came to, tuned for as many epochs; both with the defaults
of their methods. A line a pair, then means. MUSCO's claim is that rounds give no less. Needs DIR/models and DIR/sets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import torch

from tcompress import compress, finetune, load_task, make_method, open_checkpoint
from tcompress.training.options import TrainingOptions
from tcompress.training.tuning import TuningResult, needs_of, uses_of
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan, Rule, exactly

TASK = Path(__file__).parent / "tasks" / "lenet300.py"


def main() -> None:
    """Print a table."""
    asked = _arguments()
    os.environ.setdefault("TCOMPRESS_DATA", str(asked.data))
    dense = asked.data / "models" / "lenet300.safetensors"
    print(f"{'rounds':>6} {'seed':>4} {'ranks':>12} {'bytes':>7} {'untrained':>9} {'iterate':>8} {'at once':>8}")
    for rounds in asked.rounds:
        gains = []
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as folder:
                one, other = _pair(dense, rounds, seed, asked, Path(folder))
            gains.append(_accuracy(one) - _accuracy(other))
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        print(f"{rounds:>6} mean of iterate - at once: {statistics.mean(gains):+.3f}, deviation {spread:.3f}")


def _pair(
    dense: Path, rounds: int, seed: int, asked: argparse.Namespace, folder: Path
) -> tuple[TuningResult, TuningResult]:
    method = make_method("iterate")
    method = type(method)(rounds=rounds, weakening=asked.weakening, towards=asked.towards, layers=asked.layers)
    options = TrainingOptions(epochs=asked.epochs, seed=seed, device=torch.device("cpu"))
    task = load_task(str(TASK), needs_of(method), uses_of(method))
    with open_checkpoint(dense) as checkpoint:
        one = finetune(checkpoint, task, method, out=folder / "rounds.safetensors", options=options)
        settings = _settings(folder / "rounds.safetensors")
        plan = Plan(tuple(Rule(exactly(name), setting) for name, setting in settings.items()))
        compress(checkpoint, plan, out=folder / "small.safetensors")
        with open_checkpoint(folder / "small.safetensors") as small:
            other = finetune(small, task, out=folder / "once.safetensors", against=checkpoint, options=options)
    ranks = ",".join(str(setting.rank) for setting in settings.values())
    print(
        f"{rounds:>6} {seed:>4} {ranks:>12} {other.output.nbytes:>7} {other.before.scores['accuracy']:>9.2f} "
        f"{_accuracy(one):>8.2f} {_accuracy(other):>8.2f}",
        *("" if len(one.rounds) == rounds else f"({len(one.rounds)} rounds, {one.rows[-1].epoch} epochs)",),
        flush=True,
    )
    return one, other


def _settings(path: Path) -> dict:
    with open_checkpoint(path) as checkpoint:
        found = view(checkpoint)
        return {name: found.setting(name) for name in found.manifest.layers}


def _accuracy(result: TuningResult) -> float:
    return result.after.scores["accuracy"]


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=numbers, default=[2, 4])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--weakening", type=float, default=0.5)
    parser.add_argument("--towards", default="dense")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    return parser.parse_args()


if __name__ == "__main__":
    main()
