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
        f"# {document['tool']}: {_text(source['path'])}",
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
        f"| {_text(layer['name'])} | {layer['kind']} | {as_shape(layer['shape'])} | {layer['dtype']} "
        f"| {_text(setting_text(layer))} | {layer['dense_bytes']} | {layer['stored_bytes']} "
        f"| {as_error(layer['relative_error'])} | {layer['seconds']:.3f} |"
        for layer in document["layers"]
    ]
    remarks = [*compression_summary(document), *(f"limit exceeded: {text}" for text in document["limits_exceeded"])]
    return "\n".join([*lines, "", *(f"- {_text(remark)}" for remark in remarks)]) + "\n"


def _text(words: str) -> str:
    return printable(words).translate(_SPECIAL)
