"""In rounds or at once: finetune --method iterate against compress and finetune, at the same ranks and epochs.

    python tests/benchmarks/iterating.py [--rounds 2,4] [--epochs 8] [--seeds 0,1,2] [--weakening 0.5]
        [--towards dense] [--layers N] [--data DIR]

LeNet-300-100 on MNIST with tasks/lenet300.py. For each number of rounds and each seed: the dense model through
iterate, then, at once, svd of the ranks that the last round came to, tuned for as many epochs; both with the defaults
of their methods. A line a pair, then means. MUSCO's claim is that rounds give no less; (c) of papers.py is one seed of
it. Needs models/ and sets/ in DIR; without it they are where papers.py says.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from reproductions.base import Conditions
from reproductions.in_rounds import EPOCHS, Pair, pair

from tcompress import make_method
from tcompress.training.tuning import TuningResult


def main() -> None:
    """Print a table."""
    asked = _arguments()
    if asked.data is not None:
        os.environ["TCOMPRESS_DATA"] = str(asked.data)
    print(f"{'rounds':>6} {'seed':>4} {'ranks':>12} {'bytes':>7} {'untrained':>9} {'iterate':>8} {'at once':>8}")
    for rounds in asked.rounds:
        method = make_method(
            "iterate", rounds=rounds, weakening=asked.weakening, towards=asked.towards, layers=asked.layers
        )
        gains = []
        for seed in asked.seeds:
            with tempfile.TemporaryDirectory() as folder:
                found = pair(Conditions(Path(folder), seed, None), method, asked.epochs)
            _tell(found, rounds, seed)
            gains.append(_accuracy(found.rounds) - _accuracy(found.at_once))
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        print(f"{rounds:>6} mean of iterate - at once: {statistics.mean(gains):+.3f}, deviation {spread:.3f}")


def _tell(found: Pair, rounds: int, seed: int) -> None:
    one, other = found.rounds, found.at_once
    print(
        f"{rounds:>6} {seed:>4} {found.ranks:>12} {other.output.nbytes:>7} {other.before.scores['accuracy']:>9.2f} "
        f"{_accuracy(one):>8.2f} {_accuracy(other):>8.2f}",
        *("" if len(one.rounds) == rounds else f"({len(one.rounds)} rounds, {one.rows[-1].epoch} epochs)",),
        flush=True,
    )


def _accuracy(result: TuningResult) -> float:
    return result.after.scores["accuracy"]


def _arguments() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=numbers, default=[2, 4])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--weakening", type=float, default=0.5)
    parser.add_argument("--towards", default="dense")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--data", type=Path, help="in place of TCOMPRESS_DATA")
    return parser.parse_args()


if __name__ == "__main__":
    main()
