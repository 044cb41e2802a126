"""Speed and error of tt, ttm, tucker, cp beside TensorLy and of sparse-product beside pyfaust, in one run.

    python tests/benchmarks/decompositions.py [--quick] [--only tt,ttm,...] [--rounds 3] [--threads N]

Both sides get the same folded tensor and ranks. Ours is the median of several runs, theirs the fastest of as many where
one takes less than two seconds, so that noise speaks against ours. cp is timed per sweep, both from the same start;
sparse-product with the same row-and-column sets and number of sweeps, where pyfaust is installed. Weights have singular
values falling like i^-0.5. "error" is ours over theirs.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import tensorly
import torch
from svd import power_law
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor

from tcompress.formats.cp import CP
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker
from tcompress.linalg.cp import cp_reconstruct, cp_sweeps
from tcompress.linalg.palm import hierarchical, product
from tcompress.linalg.sparse_sets import LargestPerRowAndColumn, Level
from tcompress.linalg.tensor_train import tt_full, tt_svd
from tcompress.linalg.tucker import tucker, tucker_full

SHAPES = [(64, 64, 3, 3), (256, 256, 3, 3), (384, 1536), (1024, 4096), (4096, 4096), (30522, 384)]
QUICK_SHAPES = [(64, 64, 3, 3), (256, 256, 3, 3), (384, 1536)]
RANKS = (8, 64)
SWEEPS = 5
SPARSE = [(64, 576, 3, 8, 30), (256, 2304, 3, 8, 10), (384, 1536, 3, 8, 10)]  # rows, columns, factors, nonzeros, sweeps
BRIEF = 2.0  # seconds

Timed = tuple[float, Tensor]


def weight_of(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    columns = int(torch.tensor(shape[1:]).prod())
    return power_law(shape[0], columns, 0.5, generator).reshape(shape).contiguous()


def clock(run: Callable[[], Tensor], rounds: int, *, fastest: bool) -> Timed:
    times, result = [], torch.empty(0)
    for _ in range(rounds):
        started = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - started)
        if fastest and times[-1] > BRIEF:
            break
    return (min(times) if fastest else statistics.median(times)), result


def trains(folding_of: type[TT] | type[TTMatrix], weight: Tensor, rank: int) -> tuple[Callable, Callable, Tensor]:
    setting = folding_of(rank=rank)
    folding = setting.folding(tuple(weight.shape))
    tensor, ranks = folding.fold(weight), setting.clipped(folding)
    return (
        lambda: tt_svd(tensor, ranks),
        lambda: list(tensor_train(tensor, [1, *ranks, 1]).factors),
        tensor,
    )


def tuckers(weight: Tensor, rank: int) -> tuple[Callable, Callable, Tensor]:
    setting = Tucker(rank=rank)
    folding = setting.folding(tuple(weight.shape))
    tensor, ranks = folding.fold(weight), setting.clipped(folding)
    modes = list(range(len(ranks)))

    def theirs() -> tuple[Tensor, list[Tensor]]:
        (core, factors), _ = partial_tucker(tensor, list(ranks), modes=modes)
        return core, list(factors)

    return (lambda: tucker(tensor, [*ranks, None])), theirs, tensor


def rows(shape: tuple[int, ...], rounds: int, only: set[str]) -> Iterator[tuple[str, str, int, float, float, float]]:
    weight = weight_of(shape)
    size = "x".join(map(str, shape))
    for rank in RANKS:
        for name, kind in (("tt", TT), ("ttm", TTMatrix)):
            if name in only:
                ours, theirs, tensor = trains(kind, weight, rank)
                yield name, size, rank, *compared(ours, theirs, tensor, rounds, tt_full)
        if "tucker" in only:
            ours, theirs, tensor = tuckers(weight, rank)
            yield "tucker", size, rank, *compared(ours, theirs, tensor, rounds, lambda found: tucker_full(*found))
        if "cp" in only:
            yield "cp, a sweep", size, rank, *sweeps(weight, rank, rounds)


def compared(ours: Callable, theirs: Callable, tensor: Tensor, rounds: int, full: Callable) -> tuple[float, ...]:
    ours()
    our_time, our_result = clock(ours, rounds, fastest=False)
    their_time, their_result = clock(theirs, rounds, fastest=True)
    ratio = error(tensor, full(our_result)) / error(tensor, full(their_result))
    return our_time, their_time, ratio


def sweeps(weight: Tensor, rank: int, rounds: int) -> tuple[float, ...]:
    tensor = CP(rank=rank).folding(tuple(weight.shape)).fold(weight)
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(size, rank, generator=generator) for size in tensor.shape]

    def run_ours(count: int) -> Tensor:
        weights, factors, _ = cp_sweeps(tensor, start, count)
        return (weights, factors)

    def run_theirs(count: int) -> Tensor:
        initial = CPTensor((torch.ones(rank), [factor.clone() for factor in start]))
        return parafac(tensor, rank, n_iter_max=count, init=initial, tol=0)

    # What a call costs beside its sweeps is left out: the difference of two calls.
    ours_short, _ = clock(lambda: run_ours(1), rounds, fastest=False)
    ours_long, (weights, factors) = clock(lambda: run_ours(1 + SWEEPS), rounds, fastest=False)
    theirs_short, _ = clock(lambda: run_theirs(1), rounds, fastest=True)
    theirs_long, found = clock(lambda: run_theirs(1 + SWEEPS), rounds, fastest=True)
    ratio = error(tensor, cp_reconstruct(weights, factors)) / error(tensor, cp_reconstruct(found[0], found[1]))
    return (ours_long - ours_short) / SWEEPS, (theirs_long - theirs_short) / SWEEPS, ratio


def sparse_rows(rounds: int) -> Iterator[tuple[str, str, int, float, float, float]]:
    from pyfaust import fact, factparams  # noqa: PLC0415 - not everyone has it

    for m, n, count, s, iterations in SPARSE:
        matrix = weight_of((m, n)).double()
        residuals = [max(s, m >> (k + 1)) for k in range(count - 1)]
        levels = [Level(LargestPerRowAndColumn(s, s), LargestPerRowAndColumn(k, k), m) for k in residuals]
        constraints = [
            [factparams.ConstraintInt("splincol", m, m, s) for _ in residuals],
            [factparams.ConstraintInt("splincol", m, n, residual) for residual in residuals],
        ]
        stops = [factparams.StoppingCriterion(iterations) for _ in range(2)]
        parameters = factparams.ParamsHierarchical(*constraints, *stops, is_update_way_R2L=True)

        def ours(matrix=matrix, levels=levels, iterations=iterations) -> Tensor:
            scale, factors = hierarchical(matrix, levels, iterations=iterations, tolerance=0.0)
            return scale * product(factors)

        def theirs(matrix=matrix, parameters=parameters) -> Tensor:
            return torch.from_numpy(fact.hierarchical(matrix.numpy(), parameters, backend=2020).toarray())

        yield f"sparse-product, {count} factors", f"{m}x{n}", s, *compared(ours, theirs, matrix, rounds, lambda x: x)


def error(tensor: Tensor, found: Tensor) -> float:
    return float((tensor.double() - found.double()).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="tt,ttm,tucker,cp,sparse-product")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    only = set(options.only.split(","))
    print("| format | weight | rank | ours, s | theirs, s | ratio | error |\n|---|---|---|---|---|---|---|")
    with tensorly.backend_context("pytorch"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for shape in QUICK_SHAPES if options.quick else SHAPES:
            for row in rows(shape, options.rounds, only):
                show(row)
    if "sparse-product" in only and importlib.util.find_spec("pyfaust"):
        for row in sparse_rows(1 if options.quick else options.rounds):
            show(row)


def show(row: tuple[str, str, int, float, float, float]) -> None:
    name, size, rank, ours, theirs, ratio = row
    print(f"| {name} | {size} | {rank} | {ours:.3g} | {theirs:.3g} | {theirs / ours:.3g} | {ratio:.6f} |", flush=True)


if __name__ == "__main__":
    main()
