"""Options that several commands share, and what their words mean. Nothing here imports torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcompress.errors import UsageError

if TYPE_CHECKING:
    import torch

Model = Annotated[
    Path,
    typer.Argument(
        metavar="[MODEL]",
        help="A checkpoint (.safetensors, .pt, .pth, .th, .bin, .ckpt), an index, or the folder that holds one.",
        show_default="the current folder",
    ),
]
Key = Annotated[
    str | None, typer.Option(help="Entry of a nested torch checkpoint that holds the state dict.", metavar="KEY")
]
Rank = Annotated[
    int | None,
    typer.Option(help="Rank of every layer: more keeps more.", metavar="R", min=1, rich_help_panel="How much"),
]
Keep = Annotated[
    float | None,
    typer.Option(
        help="Fraction of each layer's dense BYTES that may be kept: 0.25 makes layers 4 times smaller.",
        metavar="X",
        min=0,
        max=1,
        rich_help_panel="How much",
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="Largest relative error |A-L|/|A| allowed per layer: 0 is lossless, more keeps less.",
        metavar="E",
        min=0,
        max=1,
        rich_help_panel="How much",
    ),
]
Flops = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the layers' dense multiplications that a plan may keep, at the positions --task shows.",
        metavar="X",
        min=0,
        max=1,
        rich_help_panel="How much",
    ),
]
RankMultiple = Annotated[
    int,
    typer.Option(help="A plan's ranks are multiples of this, as hardware likes 8 or 16.", metavar="M", min=1),
]
DTypeName = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Type of factors: bf16, fp16, fp32, fp64, int8, int4 or int3 (codes); default: the layer's own.",
        metavar="TYPE",
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or cuda:N.", metavar="DEVICE")]
Threads = Annotated[int | None, typer.Option(help="Number of CPU threads.", min=1, metavar="N")]
Seed = Annotated[int, typer.Option(help="Seed of randomised algorithms; the same seed gives the same bytes.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Leave layers that hold NaN or Inf dense instead of stopping.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of a table.")]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        help="Refuse layers that need more memory than this, as 8GB; default: what the machine has.", metavar="SIZE"
    ),
]
TaskFile = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Python file with model() and calibration_batches(), or an object in it that has them. ITS CODE IS RUN.",
        metavar="TASK.py[:NAME]",
    ),
]
StripPrefix = Annotated[
    str,
    typer.Option(help="What the names in the file begin with and the model's do not, such as 'module.'", metavar="P"),
]
Inputs = Annotated[
    str | None,
    typer.Option(
        help="What is assumed of convolutions' inputs where no data show them: smooth (neighbours are alike) or plain "
        "(all errors of the weight count alike); default: smooth in a plan that is made, plain with --format.",
        metavar="smooth|plain",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(help="Formats that a plan chooses from, as svd,sparse; default: every quick one.", metavar="A,B,..."),
]
Include = Annotated[
    list[str] | None, typer.Option(help="Only layers that match this glob; may be repeated.", metavar="GLOB")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Not layers that match this glob; may be repeated.", metavar="GLOB")
]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]
MaxShardSize = Annotated[
    str | None,
    typer.Option(help="Size of the output's shards, as 5GB or 500MB; default: as the input's.", metavar="SIZE"),
]
FormatName = Annotated[
    str | None,
    typer.Option(
        "--format", "-f", help="A format, as svd or svd:rank=16; `tcompress formats` lists them.", metavar="FORMAT"
    ),
]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="Take formats layer by layer from this plan.", metavar="PLAN.json")
]
RankRule = Annotated[
    str | None,
    typer.Option(
        help="svd: the rank by each layer's spectrum: evbmf, evbmf:WEAKENING or energy:SHARE.",
        metavar="RULE",
        rich_help_panel="How much",
    ),
]
OneThreshold = Annotated[
    bool, typer.Option("--global", help="sparse, lrs: one threshold over all layers; the budget is that of all.")
]

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def parse_size(text: str | None, option: str) -> int | None:
    """Return ``5GB`` or ``500MiB`` or ``12345`` in bytes. Raises UsageError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UsageError(f"{option}: {text!r} is no size; write it as 12345, 500MB, 5GB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def pick_device(name: str) -> torch.device:
    """Return the device of that name; auto takes a GPU where there is one. Raises UsageError for a missing one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise UsageError(f"--device: {name!r} is none of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: there is no {name} on this machine; --device cpu works everywhere")
    return device


def set_threads(count: int | None) -> None:
    """Limit the CPU threads of all numerical libraries in this process."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def pick_dtype(name: str | None) -> torch.dtype | None:
    """Return the type that factors are stored in, None for each layer's own. Raises UsageError for another name."""
    from tcompress.workflow.settings import STORED_TYPES

    if name is None:
        return None
    known = STORED_TYPES | {str(dtype).removeprefix("torch."): dtype for dtype in STORED_TYPES.values()}
    if name not in known:
        raise UsageError(f"--dtype: {name!r} is none of {', '.join(STORED_TYPES)}")
    return known[name]
