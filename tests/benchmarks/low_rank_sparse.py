"""low-rank-sparse: our alternation beside the published one, and beside the truncated SVD it is made of.

    python tests/benchmarks/low_rank_sparse.py [--quick] [--threads N] [--data DIR]

The baseline is OATS without calibration data (Zhang & Papyan 2025), from its description: 80 rounds, each the truncated
SVD of W - S, then the largest values of every row of W - L. It gets this tool's truncated SVD; with LAPACK's whole one
a round takes several times longer (column "LAPACK", estimated from one round). Equal rank and density for all.
"error" is |W - L - S| / |W|. "SVDs" is the time in units of one truncated SVD of the same rank.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from svd import power_law
from torch import Tensor

from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.linalg.distance import compare
from tcompress.linalg.svd import truncated_svd

SYNTHETIC = [((384, 1536), 32), ((1024, 4096), 64), ((4096, 4096), 64)]
DENSITIES = (0.5, 0.25)
OATS_ROUNDS = 80
SHARE = 0.1


def clock(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def low_rank(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = truncated_svd(matrix, rank)
    return (left * values) @ right


def row_wise(matrix: Tensor, density: float) -> Tensor:
    places = matrix.abs().topk(max(1, round(density * matrix.shape[1])), dim=1).indices
    return torch.zeros_like(matrix).scatter_(1, places, matrix.gather(1, places))


def oats(matrix: Tensor, rank: int, density: float, rounds: int = OATS_ROUNDS) -> Tensor:
    sparse = torch.zeros_like(matrix)
    for _ in range(rounds):
        low = low_rank(matrix - sparse, rank)
        sparse = row_wise(matrix - low, density)
    return low + sparse


def lapack_round(matrix: Tensor, rank: int, density: float) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    low = (left[:, :rank] * values[:rank]) @ right[:rank]
    return low + row_wise(matrix - low, density)


def weights(data: Path, quick: bool) -> Iterator[tuple[str, Tensor, int]]:
    for shape, rank in SYNTHETIC[: 1 if quick else None]:
        matrix = power_law(*shape, 0.5, torch.Generator().manual_seed(0))
        yield f"{shape[0]} x {shape[1]}, i^-0.5", matrix.contiguous(), rank
    path = data / "models" / "lenet300.safetensors"
    if path.exists():
        for name, tensor in load_file(path).items():
            if tensor.ndim == 2 and min(tensor.shape) > 50:
                rank = max(1, int(SHARE * tensor.numel() / sum(tensor.shape)))
                yield f"lenet300 {name}, {tensor.shape[0]} x {tensor.shape[1]}", tensor.float(), rank


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small matrices, seconds instead of minutes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print("| weight | rank | density | SVD s | 20 rounds s | SVDs | error | 40 rounds s | error", end="")
    print(f" | OATS {OATS_ROUNDS} s | error | LAPACK s | times faster |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, matrix, rank in weights(options.data, options.quick):
        low_rank(matrix, rank)
        svd = statistics.median(clock(lambda m=matrix, r=rank: low_rank(m, r))[0] for _ in range(5))
        for density in DENSITIES:
            cells = []
            for rounds in (20, 40):
                setting = LowRankSparse(density=density, rank=rank, rounds=rounds)
                runs = [clock(lambda s=setting, m=matrix: s.fit(m).reconstruct().detach()) for _ in range(3)]
                cells.append((statistics.median(run[0] for run in runs), compare(matrix, runs[0][1])[1]))
            theirs, rebuilt = clock(lambda m=matrix, r=rank, d=density: oats(m, r, d))
            one_round = clock(lambda m=matrix, r=rank, d=density: lapack_round(m, r, d))[0]
            (twenty, error), (forty, settled) = cells
            print(
                f"| {name} | {rank} | {density} | {svd:.3g} | {twenty:.3g} | {twenty / svd:.3g} | {error:.5f} "
                f"| {forty:.3g} | {settled:.5f} | {theirs:.3g} | {compare(matrix, rebuilt)[1]:.5f} "
                f"| {OATS_ROUNDS * one_round:.3g} | {theirs / twenty:.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
