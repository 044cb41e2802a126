"""A compression report as Markdown."""

from __future__ import annotations

from tcompress.errors import printable
from tcompress.report.documents import Document
from tcompress.report.figures import as_bytes, as_error, as_shape
from tcompress.report.tables import compression_summary, setting_text

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>()#+!|~"})


def compression_markdown(document: Document) -> str:
    """Return the report of ``compress`` as a Markdown page."""
    source, output, totals = document["source"], document["output"], document["totals"]
    lines = [
        f"# {document['tool']}: {escaped(source['path'])}",
        "",
        "| | bytes | SHA-256 |",
        "|---|---|---|",
        f"| source | {source['bytes']} | {source['sha256']} |",
        f"| output | {totals['stored_bytes']} | {output['sha256'] if output else 'dry run'} |",
        "",
        f"Compression ratio {totals['compression_ratio']:.3f}, {totals['compressed_layers']} of {totals['layers']} "
        f"layers compressed, {document['seconds']:.2f} s, peak memory {as_bytes(document['peak_memory_bytes'])}.",
        "",
        "| layer | kind | shape | dtype | format | dense bytes | stored bytes | relative error | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {escaped(layer['name'])} | {layer['kind']} | {as_shape(layer['shape'])} | {layer['dtype']} "
        f"| {escaped(setting_text(layer))} | {layer['dense_bytes']} | {layer['stored_bytes']} "
        f"| {as_error(layer['relative_error'])} | {layer['seconds']:.3f} |"
        for layer in document["layers"]
    ]
    remarks = [*compression_summary(document), *(f"limit exceeded: {text}" for text in document["limits_exceeded"])]
    return "\n".join([*lines, "", *(f"- {escaped(remark)}" for remark in remarks)]) + "\n"


def escaped(words: str) -> str:
    """Return a stranger's words as text that Markdown leaves alone."""
    return printable(words).translate(_SPECIAL)
