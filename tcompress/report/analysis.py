"""The report of ``analyze`` as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.text import Text

from tcompress.errors import printable
from tcompress.report.asked import split_asked
from tcompress.report.documents import Document
from tcompress.report.error_curves import curves_view
from tcompress.report.figures import as_bytes, as_error, as_shape
from tcompress.report.tables import Cell, limit_lines, line, setting_text, table

_NOTES_SHOWN = 20
_LESS_NEEDED = ("dtype", "kind", "break-even", "shape")  # left out, in this order, where a terminal is too narrow


@dataclass(frozen=True)
class _Fitting:
    """A table without the columns that a narrow terminal has no room for."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    right: Sequence[str]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, rows = list(self.columns), [list(row) for row in self.rows]
        for column in _LESS_NEEDED:
            made = table(columns, rows, right=self.right)
            if Measurement.get(console, options.update(width=10_000), made).maximum <= options.max_width:
                break
            place = columns.index(column)
            columns.pop(place)
            for row in rows:
                row.pop(place)
        yield table(columns, rows, right=self.right)
        left_out = [column for column in self.columns if column not in columns]
        if left_out:
            yield Text(f"left out at this width: {', '.join(left_out)}; --json has all")


def analysis_view(document: Document) -> RenderableType:
    """Show a report of ``analyze``: one asked setting in full, several side by side."""
    view = _one_setting(document) if len(document["asked"]) == 1 else _side_by_side(document)
    lines = [f"note: {printable(note)}" for note in document["notes"][:_NOTES_SHOWN]]
    more = len(document["notes"]) - _NOTES_SHOWN
    lines += [f"... and {more} more notes, see --json"] if more > 0 else []
    below = ["", curves_view(document["curves"])] if "curves" in document else []
    return Group(view, *map(line, [*lines, *_drawn(document["plots"])]), *below)


def _drawn(plots: Sequence[str]) -> list[str]:
    count = len({Path(path).stem for path in plots})
    return [f"drew {count} figures in {printable(str(Path(plots[0]).parent))}"] if plots else []


def _one_setting(document: Document) -> RenderableType:
    rows: list[list[Cell]] = [
        [
            row["name"],
            row["kind"],
            as_shape(row["shape"]),
            row["dtype"],
            setting_text(row),
            limit_lines(document["break_even"][row["name"]]),
            as_bytes(row["dense_bytes"]),
            as_bytes(row["stored_bytes"]),
            as_error(row["relative_error"]),
            as_error(row["structure"]),
            row["verdict"],
        ]
        for row in document["rows"]
    ]
    columns = ["layer", "kind", "shape", "dtype", "format", "break-even", "dense", "stored", "error", "structure"]
    if all(row["structure"] is None for row in document["rows"]):
        columns, rows = columns[:-1], [[*row[:-2], row[-1]] for row in rows]
    return _Fitting([*columns, "verdict"], rows, right=columns[6:])


def _side_by_side(document: Document) -> RenderableType:
    """A row for each layer and format, a column for each amount that is asked, and a row for what is best."""
    amounts = list(dict.fromkeys(split_asked(asked)[1] for asked in document["asked"]))
    has_structure = any(row["structure"] is not None for row in document["rows"])
    found: dict[str, dict[str, dict[str, Document]]] = {}
    for row in document["rows"]:
        label, amount = split_asked(row["asked"])
        found.setdefault(row["name"], {}).setdefault(label, {})[amount] = row
    best: dict[str, dict[str, Document]] = {}
    for winner in document["best"]:
        best.setdefault(winner["name"], {})[split_asked(winner["asked"])[1]] = winner
    rows: list[list[Cell]] = []
    for name, formats in found.items():
        for position, (label, by_amount) in enumerate(formats.items()):
            first = next(iter(by_amount.values()))
            head = [name, first["kind"], as_shape(first["shape"]), first["dtype"]] if position == 0 else [""] * 4
            limits, format_name = document["break_even"][name], label.partition(":")[0]
            own = {format_name: limits[format_name]} if format_name in limits else {}
            cells: list[Cell] = [*head, label, limit_lines(own), *(_error(by_amount.get(a)) for a in amounts)]
            gains = [row["structure"] for row in by_amount.values() if row["structure"] is not None]
            rows.append([*cells, as_error(max(gains, default=None))] if has_structure else cells)
        if name in best:
            rows.append(["", "", "", "", "best", "", *(_family(best[name].get(a)) for a in amounts)])
            rows[-1] += [""] * has_structure
    last = ["structure"] if has_structure else []
    columns = ["layer", "kind", "shape", "dtype", "format", "break-even", *amounts, *last]
    return Group(_Fitting(columns, rows, right=[*amounts, *last]), *map(line, _legend(document, has_structure)))


def _legend(document: Document, has_structure: bool) -> list[str]:
    lines = ["relative error of each layer at each setting; larger: not smaller than dense, or not to be fitted"]
    if has_structure:
        lines.append("structure: how much smaller the error is than on the same values in random order, at most")
    return lines + _tally(document)


def _tally(document: Document) -> list[str]:
    """Say how many layers each family is best for, at each fraction of the bytes."""
    layers = len({row["name"] for row in document["rows"]})
    lines = []
    for keep in dict.fromkeys(winner["keep"] for winner in document["best"]):
        counts = Counter(winner["family"] for winner in document["best"] if winner["keep"] == keep)
        unfit = layers - counts.total()
        said = [f"{family} {count}" for family, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        said[0] += " layer" if counts.most_common(1)[0][1] == 1 else " layers"
        said += [f"nothing fits {unfit}"] if unfit else []
        lines.append(f"smallest error at equal bytes, keep={keep:g}: {', '.join(said)}")
    return lines


def _family(winner: Document | None) -> Cell:
    """Name the family and, where it has several formats, the format."""
    if winner is None:
        return ""
    if winner["family"] == "low-rank":
        return ["low-rank", f"({winner['format']})"]
    return str(winner["family"]).replace(" + ", " +\n").split("\n")


def _error(row: Document | None) -> str:
    if row is None:
        return ""
    return as_error(row["relative_error"]) if row["worthwhile"] else "larger"
