"""What all figures have in common: their looks, and how they become files. The same figures give the same bytes.

Names come from strangers: they are shown as text, never as markup, and files are named after what is harmless of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tcompress.errors import OutputError, printable
from tcompress.report.writing import write_whole

_STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.hashsalt": "tcompress",
    "text.parse_math": False,
}
# Okabe and Ito's colours, told apart by colour-blind readers too; markers help in print.
LINES = tuple(
    zip(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"), "osD^vPX", strict=True)
)
_STEM_LENGTH = 80
DOTS_PER_INCH = 120


def make_folder(folder: Path) -> None:
    """Make the folder of the figures, if there is none. Raises OutputError when it cannot be made."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", path=folder) from error


@contextmanager
def styled() -> Iterator[None]:
    """Draw with the style of all figures, whatever the user's is."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def shortened(name: str, length: int) -> str:
    """Return a name on one line, its middle left out where it is long: the end says more than the beginning."""
    name = legible(name)
    front = length // 3
    return name if len(name) <= length else f"{name[:front]}…{name[front + 1 - length :]}"


def legible(text: str) -> str:
    """Return text whose every character the font has: others as their escapes."""
    return printable(text).encode("latin-1", "backslashreplace").decode("latin-1")


def stem_of(kind: str, name: str, taken: set[str]) -> str:
    """Return a file name for a layer that no other layer has, on disks that take A for a as well."""
    wanted = f"{kind}-" + re.sub(r"[^A-Za-z0-9._-]", "_", name)[:_STEM_LENGTH]
    stem, count = wanted, 1
    while stem.lower() in taken:
        count += 1
        stem = f"{wanted}-{count}"
    taken.add(stem.lower())
    return stem


def save(figure: Figure, path: Path) -> list[Path]:
    """Write a figure as PNG and SVG, without what differs between two runs."""
    FigureCanvasAgg(figure)
    files = []
    for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix, metadata=metadata)
        figure.set_layout_engine("none")  # the second file has the first one's layout, which takes longer than drawing
        files.append(path.with_name(f"{path.name}.{suffix}"))
        write_whole(files[-1], content.getvalue())
    return files
