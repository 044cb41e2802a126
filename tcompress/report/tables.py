"""Documents as tables for a terminal. Names come from strangers: they are shown as text, never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tcompress.errors import listed, printable
from tcompress.report.documents import Document
from tcompress.report.figures import as_bytes, as_error, as_seconds, as_shape
from tcompress.workflow.settings import STORED_TYPES

Cell = str | list[str]  # a list is a line each


def compression_view(document: Document) -> RenderableType:
    """Show a report of ``compress``: a row a layer, then the totals.

    Stored types and errors of outputs have columns where there is something to say.
    """
    typed = any(
        layer["stored_dtype"] and str(STORED_TYPES[layer["stored_dtype"]]) != f"torch.{layer['dtype']}"
        for layer in document["layers"]
    )
    looked_at = any(layer["output_error"] is not None for layer in document["layers"])
    rows = [
        [
            layer["name"],
            layer["kind"],
            as_shape(layer["shape"]),
            layer["dtype"],
            setting_text(layer),
            *([layer["stored_dtype"] or ""] if typed else []),
            as_bytes(layer["dense_bytes"]),
            as_bytes(layer["stored_bytes"]),
            as_error(layer["relative_error"]),
            *([as_error(layer["output_error"])] if looked_at else []),
        ]
        for layer in document["layers"]
    ]
    numbers = ["dense", "stored", "error", *(["of output"] if looked_at else [])]
    columns = ["layer", "kind", "shape", "dtype", "format", *(["as"] if typed else []), *numbers]
    return Group(table(columns, rows, right=numbers), *map(line, compression_summary(document)))


def compression_summary(document: Document) -> list[str]:
    """Return the lines below the table of ``compress``."""
    totals = document["totals"]
    kept = [layer for layer in document["layers"] if layer["reason"]]
    lines = [f"stays dense: {printable(layer['name'])}: {layer['reason']}" for layer in kept[:20]]
    lines += [f"... and {len(kept) - 20} more layers stay dense, see --json or --report"] if len(kept) > 20 else []
    noted = [(layer["name"], note) for layer in document["layers"] for note in layer["notes"]]
    lines += [f"note: {printable(name)}: {note}" for name, note in noted[:20]]
    lines += [f"... and {len(noted) - 20} more notes, see --json or --report"] if len(noted) > 20 else []
    lines += [f"note: {printable(note)}" for note in document["notes"]]
    if document["other_values"]:
        names = printable(listed(document["other_values"]))
        lines.append(f"note: not carried over, being no tensors: {names}")
    lines += _repair_lines(document["repairs"])
    most = "" if totals["exact_bytes"] else "at most "
    sizes = f"{totals['dense_bytes']} -> {most}{totals['stored_bytes']} bytes on disk"
    verb = "would compress" if document["dry_run"] else "compressed"
    # Of an output that is larger a note of the document says by how much.
    is_larger = totals["stored_bytes"] > totals["dense_bytes"]
    change = "" if is_larger else f"{totals['dense_bytes'] / totals['stored_bytes']:.2f} x smaller, "
    lines.append(
        f"{verb} {totals['compressed_layers']} of {totals['layers']} layers: {sizes}, "
        f"{change}in {as_seconds(document['seconds'])}"
    )
    if document["output"] is not None:
        lines.append(f"wrote {printable(document['output']['path'])}")
    return lines


def _repair_lines(repairs: Document | None) -> list[str]:
    """Say what was repaired, and what that is worth on inputs that it was not found on."""
    if repairs is None or not repairs["modules"]:
        return []
    if repairs["distance_before"] is None:
        return ["note: nothing was repaired: of too few or not finite calibration inputs none can judge a repair"]
    count, before, after = (repairs[key] for key in ("held_out", "distance_before", "distance_after"))
    if not repairs["tensors"]:
        return [f"repaired nothing: no repair brings the output on {count} held-out inputs nearer ({before:.4g} off)"]
    names = f"{len(repairs['tensors'])} biases, scales or statistics"
    return [f"repaired {names}: on {count} held-out inputs the output is {after:.4g} off, was {before:.4g}"]


def inspection_view(document: Document) -> RenderableType:
    """Show a report of ``inspect``: a row a tensor, then what the file says of itself."""
    is_compressed = document["manifest"] is not None
    rows: list[list[Cell]] = []
    for row in document["tensors"]:
        tie = f"tied to {row['tied_to']}" if row["tied_to"] else ""
        cells: list[Cell] = [row["name"], as_shape(row["shape"]), row["dtype"], row["kind"] or "", tie]
        cells.append(as_bytes(row["dense_bytes"]))
        if is_compressed:
            cells += [
                "" if row["format"] is None else setting_text({**row, "format": row["format"].partition(":")[0]}),
                row["stored_dtype"] or "",
                as_bytes(row["stored_bytes"]),
                as_error(row["relative_error"]),
            ]
        rows.append(cells)
    columns = ["tensor", "shape", "dtype", "kind", "", "dense"]
    columns += ["format", "as", "stored", "error"] if is_compressed else []
    dense = sum(row["dense_bytes"] for row in document["tensors"] if not row["tied_to"])
    lines = [
        f"{len(document['tensors'])} tensors, {dense} bytes dense, in {len(document['files'])} file(s) "
        f"of {document['file_bytes']} bytes"
    ]
    if document["key"]:
        lines.append(f"the state dict is the entry {printable(document['key'])}")
    if document["other_values"]:
        lines.append(f"beside the tensors: {printable(listed(document['other_values']))}")
    if document["manifest"]:
        manifest = document["manifest"]
        source = manifest["source"]
        lines.append(
            printable(
                f"compressed by {manifest['writer']} from {source.get('bytes')} bytes, SHA-256 {source.get('sha256')}"
            )
        )
        lines += _repaired_names(manifest["repaired"])
    return Group(table(columns, rows, right=["dense", "stored", "error"]), *map(line, lines))


def _repaired_names(names: Sequence[str]) -> list[str]:
    """Name the first tensors that differ from the original's without being compressed."""
    return [f"repaired after compression: {printable(listed(names))}"] if names else []


def verification_view(document: Document) -> RenderableType:
    """Show a report of ``verify``."""
    lines = [f"problem: {problem}" for problem in document["problems"]]
    lines += _repaired_names(document["repaired"])
    measured = any(layer["measured_error"] is not None for layer in document["layers"])
    errors = "errors measured again" if measured else "errors not measured again"
    errors += "" if document["against"] else " (give --against MODEL)"
    verdict = "is what it says it is" if document["passed"] else f"has {len(document['problems'])} problem(s)"
    layers = len(document["layers"])
    lines.append(f"{printable(document['path'])} {verdict}: {layers} compressed layers, {errors}")
    return Group(*map(line, lines))


def decompression_view(document: Document) -> RenderableType:
    """Show a report of ``decompress``."""
    output = document["output"]
    return line(
        f"wrote {printable(output['path'])}: {document['tensors']} tensors, {document['rebuilt']} of them rebuilt, "
        f"{output['bytes']} bytes, in {as_seconds(document['seconds'])}"
    )


def formats_view(document: Document) -> RenderableType:
    """Show the table of formats."""
    rows = [
        [
            entry["name"],
            entry["summary"],
            ", ".join(
                name if default is None else f"{name}={_short(default)}" for name, default in entry["options"].items()
            ),
            entry["reference"],
        ]
        for entry in document["formats"]
    ]
    return table(["format", "what it is", "options", "paper"], rows, right=[])


def setting_text(row: Document) -> str:
    """Return format and options on one line, without options that say nothing of size when there are none."""
    options = ":".join(_option(name, value) for name, value in (row["options"] or {}).items())
    return ":".join(filter(None, [row["format"] or "", options]))


def _option(name: str, value: object) -> str:
    # Options of a format inside an option carry its name, as on the command line: inner=tt:inner.order=3.
    return f"{name}={_short(value)}".replace(":", f":{name}.")


def limit_lines(limits: Document) -> list[str]:
    """Return the break-even setting of each format: up to there it is smaller than dense."""
    found = []
    for name, options in limits.items():
        sizes = "never" if options is None else ":".join(f"{key} {_short(value)}" for key, value in options.items())
        found.append(sizes if len(limits) == 1 else f"{name} {sizes}")
    return found


def _short(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], *, right: Sequence[str]) -> Table:
    """Return a table without lines; the columns ``right`` hold figures."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_figure = column in right
        # A cut-off name cannot be copied into --include: names fold, figures never do.
        made.add_column(column, justify="right" if is_figure else "left", no_wrap=is_figure, overflow="fold")
    for row in rows:
        made.add_row(*map(_text, row))
    return made


def line(words: str) -> Text:
    """Return a line for the terminal, or the log of a CI whose runner obeys lines that begin with ``::`` or ``##``.

    Where a line folds, any part of a name may come to stand at its beginning.
    """
    return Text(printable(words).replace("::", r":\x3a"))


def _text(cell: Cell) -> Text:
    return Text("\n").join(map(line, [cell] if isinstance(cell, str) else cell))
