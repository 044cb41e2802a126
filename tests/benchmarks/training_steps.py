"""Training steps of factorised layers beside dense ones and beside tltorch's, in one run.

A step is forward, backward (the input's gradient too, as of a layer in the middle of a network) and AdamW. The layers
are those that `tcompress finetune` trains: what `load_into` makes, after `let_learn`. All layers of a size take their
turns in every round; "of dense" is the median, over the rounds, of a layer's time divided by the dense layer's in the
same round: below 1 is faster than training the dense layer. "of tltorch" is the same beside tltorch's layer of the same
modes and number of parameters, the faster of its two implementations. The factors are random: time does not depend on
their values.

    python tests/benchmarks/training_steps.py [--sizes 256,1024] [--rows 128,1024] [--only svd] [--rounds 9]
                                              [--threads 1] [--device cuda] [--precision bf16]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from runtime import PEERS, peer, random_layer, settings, times_in_turn, tltorch
from torch import Tensor, nn

from tcompress.training.factors import let_learn

SIZES = (256, 512, 1024, 2048, 4096)
ROWS = (128, 1024)
CONV, IMAGE, IMAGES = (64, 64, 3, 3), 16, 32
CONV_SETTINGS = ["svd:rank=16", "tucker:rank=16", "tucker:rank=32", "cp:rank=32", "cp:rank=64", "sparse:density=0.05"]
_WINDOW = 0.02  # seconds of one measurement at least
_TOO_SLOW = 10.0  # seconds of one step of a peer: not measured
_ABSENT = "not installed"

Step = Callable[[], None]


def linear_settings(size: int) -> list[str]:
    return [
        *(f"svd:rank={size // part}" for part in (16, 8, 4)),
        *(f"{name}:rank={rank}" for name in ("ttm", "tt") for rank in (8, 32)),
        "sparse:density=0.05",
        "sparse:density=0.1",
        "low-rank-sparse:rank=32:density=0.05",
        "low-rank-sparse:rank=32:density=0.1",
        "sparse-product:nonzeros=8",
    ]


def make_step(layer: nn.Module, x: Tensor, half: AbstractContextManager[object]) -> Step:
    """Return one step of training. x: an input that wants a gradient."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-5, weight_decay=0.0)
    with half:
        gradient = torch.randn_like(layer(x)) / x.numel()

    def step() -> None:
        with half:
            y = layer(x)
        y.backward(gradient)
        optimizer.step()
        optimizer.zero_grad()
        x.grad = None

    return step


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


def peer_steps(dense: nn.Module, name: str, setting: object, make: Callable[[nn.Module], Step]) -> list[Step]:
    """Return the steps of tltorch's layers that run, and soon enough."""
    found = []
    for layer in peer(dense, name, setting):
        started = time.perf_counter()
        try:
            step = make(layer.train().requires_grad_(True))
            step()
        except Exception:  # noqa: BLE001  # a combination that it cannot train is no line of the table
            continue
        if time.perf_counter() - started < _TOO_SLOW:
            found.append(step)
    return found


def table(dense: nn.Module, texts: Sequence[str], x: Tensor, asked: argparse.Namespace) -> None:
    """Print a line for each setting."""
    half = torch.autocast(asked.device, torch.bfloat16) if asked.precision == "bf16" else nullcontext()
    make = partial(make_step, x=x, half=half)
    steps, lines = [make(dense)], []
    for text, setting in settings(texts, tuple(dense.weight.shape)):
        layer = nn.Sequential(random_layer(dense, setting, "auto")).train()
        let_learn(layer)
        name, own = text.split(":", maxsplit=1)[0], len(steps)
        steps.append(make(layer.requires_grad_(True)))
        others = peer_steps(dense, name, setting, make)
        steps += others
        lines.append((text, name, own, range(own + 1, own + 1 + len(others))))
    times = times_in_turn(steps, asked.rounds, asked.device, _WINDOW)
    middle = [1e3 * statistics.median(each) for each in times]
    for text, name, own, others in lines:
        fastest = min(others, key=lambda number: middle[number], default=None)
        beside = _ABSENT if tltorch is None and name in PEERS else ""
        beside = beside if fastest is None else f"{ratio(times[own], times[fastest]):.2f}"
        sizes, count = "x".join(map(str, dense.weight.shape)), " x ".join(map(str, x.shape[:1] + x.shape[2:]))
        cells = [text, sizes, count, f"{middle[0]:.3g}", f"{middle[own]:.3g}", f"{ratio(times[own], times[0]):.2f}"]
        print("| " + " | ".join([*cells, beside]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="of square linear layers")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="of their inputs")
    parser.add_argument("--only", default="", help="formats with this in their text")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    print("| format | weight | rows | dense ms | ours ms | of dense | of tltorch |\n" + "|---" * 7 + "|")
    kind = {"device": asked.device, "requires_grad": True}
    for size in (int(each) for each in asked.sizes.split(",") if each):
        for rows in map(int, asked.rows.split(",")):
            dense = nn.Linear(size, size, device=asked.device)
            chosen = [text for text in linear_settings(size) if asked.only in text]
            table(dense, chosen, torch.randn(rows, size, **kind), asked)
    conv = nn.Conv2d(CONV[1], CONV[0], CONV[2:], padding=1, device=asked.device)
    chosen = [text for text in CONV_SETTINGS if asked.only in text]
    table(conv, chosen, torch.randn(IMAGES, CONV[1], IMAGE, IMAGE, **kind), asked)


if __name__ == "__main__":
    main()
