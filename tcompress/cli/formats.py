"""tcompress formats."""

from __future__ import annotations

from tcompress.cli.options import Json


def formats(as_json: Json = False) -> None:
    """List the formats, their options with defaults, and the paper of each."""
    from tcompress.cli.console import show
    from tcompress.report.documents import formats_document
    from tcompress.report.tables import formats_view

    document = formats_document()
    show(document, formats_view(document), as_json=as_json)
