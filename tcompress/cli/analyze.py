"""tcompress analyze."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tcompress.cli.options import (
    AllowNonfinite,
    Device,
    DTypeName,
    Json,
    Keep,
    Key,
    MaxMemory,
    Model,
    Rank,
    Seed,
    Threads,
    Tolerance,
    parse_size,
    pick_device,
    pick_dtype,
    set_threads,
)
from tcompress.errors import UsageError

if TYPE_CHECKING:
    from tcompress.checkpoint.statistics_file import Statistics
    from tcompress.formats import Format
    from tcompress.workflow.plan import Target

Formats = Annotated[
    list[str] | None,
    typer.Option(
        "--format",
        "-f",
        help="A format as svd or svd:rank=16; may be repeated. Default: every quick one.",
        metavar="FORMAT",
    ),
]
Structure = Annotated[
    bool,
    typer.Option(
        "--structure/--no-structure",
        help="Fit low-rank formats to the shuffled weight as well: how much they gain from its structure.",
    ),
]
Plots = Annotated[
    Path | None,
    typer.Option(
        help="Draw into this folder, as PNG and SVG: errors per layer (errors.*), and each layer's values before and "
        "after its low-rank part is removed (weights-LAYER.*). Files of these names are replaced. Needs matplotlib.",
        metavar="DIR",
    ),
]
Curves = Annotated[
    bool,
    typer.Option(
        "--curves",
        help="Tell the error of every size as well, beside that of the same values in random order; in full with "
        "--json, as figures (curves-LAYER.*) with --plots.",
    ),
]
Stats = Annotated[
    Path | None,
    typer.Option(
        help="What `tcompress calibrate` wrote of this model: curves are those of errors of the layers' outputs.",
        metavar="STATS",
    ),
]
Layers = Annotated[list[str] | None, typer.Option(help="Glob on layer names; may be repeated.", metavar="GLOB")]


def analyze(
    model: Model = Path(),
    formats: Formats = None,
    rank: Rank = None,
    keep: Keep = None,
    tolerance: Tolerance = None,
    layers: Layers = None,
    structure: Structure = True,
    curves: Curves = False,
    stats: Stats = None,
    plots: Plots = None,
    dtype: DTypeName = None,
    key: Key = None,
    allow_nonfinite: AllowNonfinite = False,
    device: Device = "auto",
    threads: Threads = None,
    max_memory: MaxMemory = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Say layer by layer what compression would cost: error, bytes, and where a format stops being smaller.

    Example: tcompress analyze model.safetensors --format svd --rank 8
    """
    from tcompress.checkpoint.memory import limited
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import progress_bar, show
    from tcompress.report.analysis import analysis_view
    from tcompress.report.documents import analysis_document
    from tcompress.report.error_curves import curves_document
    from tcompress.report.writing import check_plots
    from tcompress.workflow import analysis
    from tcompress.workflow.calibration import require_source
    from tcompress.workflow.error_curves import error_curves
    from tcompress.workflow.removal import low_rank_of, removals
    from tcompress.workflow.settings import Settings

    asked = _asked(formats, rank, keep, tolerance, seed, curves=curves)
    settings = Settings(pick_dtype(dtype), pick_device(device), allow_nonfinite)
    set_threads(threads)
    memory = parse_size(max_memory, "--max-memory")
    if plots is not None:
        check_plots(plots)
    statistics = _read_statistics(stats, curves=curves)
    with limited(memory), open_checkpoint(model, key=key) as checkpoint, progress_bar() as progress:
        if statistics is not None:
            require_source(statistics, checkpoint)
        found = analysis.analyze(
            checkpoint, asked, layers=layers or (), structure=structure, settings=settings, progress=progress
        )
        tried = (asked or analysis.usual_choices()) if curves else ()
        told = error_curves(
            checkpoint, found.layers, tried, statistics=statistics, settings=settings, progress=progress
        )
        files: list[Path] = []
        notes: list[str] = []
        if plots is not None:
            from tcompress.report.curve_plots import draw_curves
            from tcompress.report.plots import draw

            low_rank = low_rank_of(asked if formats else None)
            parts = removals(checkpoint, found.layers, low_rank, device=settings.device, progress=progress)
            files, notes = draw(found, parts, plots)
            files += draw_curves(told, plots)
    document = analysis_document(found, plots=files, notes=notes)
    if curves:
        document["curves"] = curves_document(told)
    show(document, analysis_view(document), as_json=as_json)


def _asked(
    formats: list[str] | None,
    rank: int | None,
    keep: float | None,
    tolerance: float | None,
    seed: int,
    *,
    curves: bool,
) -> list[Format | Target] | None:
    """Return what is to be looked at; None for what is tried unasked. Curves show all sizes, and need none."""
    from tcompress.cli.choices import at_usual_sizes, choices, quick_formats

    sized = rank is not None or keep is not None or tolerance is not None
    if formats and curves and not sized:
        return at_usual_sizes(formats, seed=seed)
    if not formats and not sized:
        return None
    names = formats or quick_formats(with_rank=rank is not None)
    return choices(names, rank=rank, keep=keep, tolerance=tolerance, seed=seed)


def _read_statistics(path: Path | None, *, curves: bool) -> Statistics | None:
    from tcompress.checkpoint.statistics_file import read_statistics

    if path is None:
        return None
    if not curves:
        raise UsageError("--stats says how --curves measures errors; give --curves as well")
    return read_statistics(path)
