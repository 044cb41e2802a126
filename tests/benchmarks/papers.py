"""Figures of papers and slides, each beside what comes out here.

    python tests/benchmarks/papers.py [--only a] [--seed 0] [--epochs N]

a  MNIST by a tensor-train layer of ranks 1 to 4, trained from random cores (the slides' table)
b  LeNet-300-100 by Learning-Compression: 5 % of the weights, learnt ranks
c  rounds of compressing and training against all at once (MUSCO); more seeds of it: iterating.py
d  sparse products against low-rank formats at equal numbers of values
e  low-rank plus sparse against sparse and low rank alone, residual against masking
f  a sum of reshaped low-rank matrices against one term
g  shuffled entries against their own order, trained
h  convolutions of one shape decomposed jointly (T-Net) against each by itself
i  reconstruction layer by layer against training end to end

A table for each. One thread, unless --threads says more. Data as the tasks in tasks/ say: in ../shared/data beside the
checkout, or where TCOMPRESS_DATA says. Nothing is kept between runs, and the same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from reproductions import equal_parameters, in_rounds, joint_layers, tensor_train_mnist, ways_of_training
from reproductions.base import Conditions, Reproduction

REPRODUCTIONS: dict[str, Reproduction] = {
    "a": tensor_train_mnist.REPRODUCTION,
    "b": ways_of_training.LEARNT,
    "c": in_rounds.REPRODUCTION,
    "d": equal_parameters.SPARSE_PRODUCTS,
    "e": ways_of_training.PRUNED,
    "f": equal_parameters.RESHAPED_SUM,
    "g": equal_parameters.SHUFFLED,
    "h": joint_layers.REPRODUCTION,
    "i": ways_of_training.MATCHED,
}


def table(letter: str, seed: int, epochs: int | None) -> None:
    reproduction, started = REPRODUCTIONS[letter], time.perf_counter()
    print(f"### ({letter}) {reproduction.title}\n\n{reproduction.setting}\n")
    print("| run | figure | measured | paper | source |\n" + "|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for row in reproduction.rows(Conditions(Path(folder), seed, epochs)):
            print(f"| {row.run} | {row.figure} | {row.measured} | {row.paper} | {row.source} |", flush=True)
    print(f"\nSeed {seed}, {torch.get_num_threads()} threads, {time.perf_counter() - started:.0f} s.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=REPRODUCTIONS, default=list(REPRODUCTIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="in place of each reproduction's own number: a quick look")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    for letter in asked.only:
        table(letter, asked.seed, asked.epochs)


if __name__ == "__main__":
    main()
