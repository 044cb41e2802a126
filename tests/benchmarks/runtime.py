"""Forward passes of factorised layers beside dense ones and beside tltorch's, in one run.

Every line is one layer and one batch: milliseconds of the dense layer; of the layer as `load_into` makes it
(`cache="auto"`), which took what stands before its time; through the factors; with `cache="never"`; and of tltorch's
layer of the same modes and number of parameters, the faster of its two implementations. The columns after them are
times faster than dense. The factors are random: time does not depend on their values.

    python tests/benchmarks/runtime.py [--quick] [--rounds 9] [--threads 2] [--device cuda --dtype bf16]
                                       [--shape 4096x4096]

`--sparse` prints the measurement behind the choice of a way for sparse matrices instead.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse as scipy_sparse
from torch import Tensor, nn

from tcompress.formats import Format, find_format, make, parse
from tcompress.formats.compressed import compressed_rows
from tcompress.formats.effort import dense_effort
from tcompress.runtime.install import factorized
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import assemble
from tcompress.runtime.ways import prepare

try:
    import tltorch
except ImportError:
    tltorch = None

LINEAR = [(384, 384), (1024, 4096), (4096, 4096)]
CONV = (256, 256, 3, 3)
SIZE = 28
BATCHES = (1, 32)
LINEAR_SETTINGS = [
    *(f"svd:rank={rank}" for rank in (8, 64, 256, 512)),
    *(f"{name}:rank={rank}" for name in ("tt", "ttm", "tucker", "cp") for rank in (8, 64, 256)),
    *(f"reshaped-sum:rank={rank}" for rank in (8, 64)),
    *(f"sparse:density={density}" for density in (0.02, 0.05, 0.1, 0.2, 0.5)),
    *(f"low-rank-sparse:rank=64:density={density}" for density in (0.02, 0.1)),
    "sparse-product:nonzeros=8",
    "shuffled:inner=svd:rank=64",
]
CONV_SETTINGS = [
    *(f"svd:rank={rank}" for rank in (8, 64, 128)),
    *(f"svd:rank={rank}:matricisation=spatial" for rank in (8, 64, 256)),
    *(f"{name}:rank={rank}" for name in ("tt", "ttm", "tucker", "cp") for rank in (8, 64, 256)),
    *(f"reshaped-sum:rank={rank}" for rank in (8, 64)),
    "sparse:density=0.1",
]
_MOST_OF_PEER = 100_000  # values of a CP or Tucker layer
_NEAR = 0.1
_WINDOW = 0.01  # seconds
_HOPELESS = 10  # times the dense effort: not measured
_TOO_SLOW = 0.3  # seconds of one call of a peer, foreseen from one input: not measured either
PEERS = {"ttm": "blocktt", "tt": "tt", "tucker": "tucker", "cp": "cp"}


def times_in_turn(
    calls: Sequence[Callable[[], object]], rounds: int, device: str, window: float = _WINDOW
) -> list[list[float]]:
    """Return the seconds of every call in every round; the order is turned round from one to the next.

    window: the seconds that one measurement takes at least.
    """
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
        call()
    for number in range(rounds):
        in_turn = list(zip(found, calls, strict=True))
        for times, call in in_turn if number % 2 else reversed(in_turn):
            call()  # what the one before it left in the caches is not to count
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < window or count < 1:
                call()
                count += 1
            if device == "cuda":
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / count)
    return found


def seconds_each(calls: Sequence[Callable[[], object]], rounds: int, device: str) -> list[float]:
    """Return the least time of each call over the rounds, in which all of them are timed in turn."""
    return [min(times) for times in times_in_turn(calls, rounds, device)]


def random_layer(dense: nn.Module, setting: Format, cache: str) -> Factorized:
    """Return a layer with random factors in place of a dense one."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    shape = tuple(weight.shape)
    held = {}
    for name, spec in setting.factor_specs(shape, weight.dtype).items():
        values = torch.randn(spec.shape) / math.sqrt(spec.shape[-1])
        if spec.nonzeros is not None:
            keep = torch.rand(spec.shape) < spec.nonzeros / spec.values
            values = torch.where(keep, values, 0)
        held[name] = nn.Parameter(values.to(weight), requires_grad=False)
    factors = assemble(setting, shape, held, weight.dtype)
    return factorized(dense, factors, setting, like=weight, cache=cache, origin=None).eval()


def settings(texts: Sequence[str], shape: tuple[int, ...]) -> Iterator[tuple[str, Format]]:
    for text in texts:
        name, options = parse(text)
        setting = make(find_format(name.name), options).pinned(shape)
        if setting.stored_bytes(shape, torch.float32) < 4 * math.prod(shape):
            yield text, setting


def peer(dense: nn.Module, name: str, setting: Format) -> list[nn.Module]:
    """Return tltorch's layers with as many parameters, to a tenth, one for each implementation."""
    if tltorch is None or name not in PEERS:
        return []
    shape = tuple(dense.weight.shape)
    stored = sum(spec.values for spec in setting.factor_specs(shape, torch.float32).values())
    if isinstance(dense, nn.Linear) and name in {"cp", "tucker"} and stored > _MOST_OF_PEER:
        return []  # it would need all of the memory
    made = []
    for implementation in ("factorized", "reconstructed"):
        ratio = stored / math.prod(shape)
        try:
            for _ in range(12):  # its ranks are not quite those that make the ratio asked for
                layer = _peer(dense, name, setting, ratio, implementation)
                count = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
                if abs(count / stored - 1) < _NEAR:
                    break
                ratio *= stored / count
        except Exception:  # noqa: BLE001  # a combination that it does not have is no line of the table
            continue
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)
        made.append(layer.to(dense.weight).eval().requires_grad_(False))
    return made


def _peer(dense: nn.Module, name: str, setting: Format, ratio: float, implementation: str) -> nn.Module:
    shape = tuple(dense.weight.shape)
    if isinstance(dense, nn.Linear):
        out_modes, in_modes = _modes(setting, shape)
        kind = "blocktt" if name == "tt" else PEERS[name]
        return tltorch.FactorizedLinear(
            in_modes, out_modes, rank=ratio, factorization=kind, implementation=implementation
        )
    options = {"padding": 1, "has_bias": True, "order": 2, "factorization": PEERS[name]}
    return tltorch.FactorizedConv(shape[1], shape[0], shape[2:], rank=ratio, implementation=implementation, **options)


def table(dense: nn.Module, texts: Sequence[str], inputs: Sequence[Tensor], rounds: int, quick: bool) -> None:
    shape = tuple(dense.weight.shape)
    sizes = "x".join(map(str, shape))
    for text, setting in settings(texts, shape):
        auto, never, always = (random_layer(dense, setting, cache) for cache in ("auto", "never", "always"))
        peers = peer(dense, text.split(":", maxsplit=1)[0], setting)
        for x in inputs:
            prepared = prepare(auto.factors, setting, dense.weight.dtype)
            geometry = {}
            if not isinstance(dense, nn.Linear):
                geometry = {"padding": (1, 1), "stride": (1, 1), "dilation": (1, 1), "groups": 1}
                run = lambda x=x, prepared=prepared, geometry=geometry: prepared.conv(x, **geometry)  # noqa: E731
                n = auto._positions(x)
            else:
                run = lambda x=x, prepared=prepared: prepared.linear(x)  # noqa: E731
                n = len(x)
            chose = "dense" if isinstance(auto._way(n, **geometry), Tensor) else "factors"
            if prepared.effort(n) > _HOPELESS * dense_effort(math.prod(shape), n):
                run = None
            calls = [lambda x=x: dense(x), lambda x=x, auto=auto: auto(x), *([] if run is None else [run])]
            calls += [] if quick else [lambda x=x, never=never: never(x)]
            calls += [lambda x=x, layer=layer: layer(x) for layer in peers if _runs(layer, x)]
            times = seconds_each(calls, rounds, x.device.type)
            base, own, *times = times
            through = None if run is None else times.pop(0)
            least = None if quick else times.pop(0)
            other = min(times, default=None)
            cells = [
                *(text, sizes, len(x), _ms(base), chose, _ms(own), _ms(through), _ms(least), _ms(other)),
                *(f"{base / own:.2f}", "" if through is None else f"{base / through:.2f}"),
                "" if other is None else f"{other / own:.2f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        del always


def _modes(setting: Format, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the setting's own modes of both sides, or two a side where it has others for each."""
    out_modes, in_modes = (setting.options().get(which) for which in ("out_modes", "in_modes"))
    if out_modes and in_modes and len(out_modes) == len(in_modes):
        return tuple(out_modes), tuple(in_modes)
    return (shape[0] // 32, 32), (shape[1] // 64, 64)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}"


def _runs(layer: nn.Module, x: Tensor) -> bool:
    """Tell whether a peer runs at all, and soon enough for one input to be tried with many."""
    start = time.perf_counter()
    try:
        layer(x[:1])
    except Exception:  # noqa: BLE001
        return False
    return (time.perf_counter() - start) * len(x) < _TOO_SLOW


def sparse_table(rounds: int) -> None:
    print(
        "| size | density | batch | dense ms | torch CSR int32 | int64 | SciPy | rebuilt each time |\n"
        + "|---" * 8
        + "|"
    )
    for size in (384, 1024, 4096):
        for density in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
            matrix = torch.randn(size, size) * (torch.rand(size, size) < density)
            rows, wide = compressed_rows(matrix), matrix.to_sparse_csr()
            other = scipy_sparse.csr_array(matrix.numpy())
            packed = torch.from_numpy(np.packbits(matrix.numpy() != 0))
            values = matrix[matrix != 0]

            def rebuilt(x: Tensor, packed: Tensor = packed, values: Tensor = values, size: int = size) -> Tensor:
                mask = torch.from_numpy(np.unpackbits(packed.numpy()).view(np.bool_)).reshape(size, size)
                return F.linear(x, torch.zeros(size, size).masked_scatter_(mask, values))

            for batch in (1, 8, 64, 256):
                x = torch.randn(batch, size)
                calls = [
                    lambda x=x, matrix=matrix: F.linear(x, matrix),
                    lambda x=x, rows=rows: (rows @ x.T).T,
                    lambda x=x, wide=wide: (wide @ x.T).T,
                    lambda x=x, other=other: torch.from_numpy((other @ x.numpy().T).T),
                    lambda x=x, rebuilt=rebuilt: rebuilt(x),
                ]
                base, *times = seconds_each(calls, rounds, "cpu")
                cells = [f"{size}x{size}", density, batch, f"{base * 1e3:.3g}", *(f"{base / t:.2f}" for t in times)]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sparse", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--only", default="", help="formats with this in their text")
    parser.add_argument(
        "--shape", default="", help="384x384, 1024x4096, 4096x4096 or 256x256x3x3; all of them if not given"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        if asked.sparse:
            sparse_table(asked.rounds)
            return
        head = ["format", "shape", "batch", "dense ms", "auto takes", "auto ms", "factors ms", "never ms", "tltorch ms",
                "auto", "factors", "auto over tltorch"]  # fmt: skip
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        kind = {"device": asked.device, "dtype": torch.float32 if asked.dtype == "fp32" else torch.bfloat16}
        for out, in_ in [sizes for sizes in LINEAR if asked.shape in {"", f"{sizes[0]}x{sizes[1]}"}]:
            dense = nn.Linear(in_, out, **kind).eval()
            inputs = [torch.randn(batch, in_, **kind) for batch in BATCHES]
            table(dense, [t for t in LINEAR_SETTINGS if asked.only in t], inputs, asked.rounds, asked.quick)
        if asked.shape not in {"", "x".join(map(str, CONV))}:
            return
        conv = nn.Conv2d(CONV[1], CONV[0], 3, padding=1, **kind).eval()
        images = [torch.randn(batch, CONV[1], SIZE, SIZE, **kind) for batch in BATCHES]
        table(conv, [t for t in CONV_SETTINGS if asked.only in t], images, asked.rounds, asked.quick)


if __name__ == "__main__":
    main()
