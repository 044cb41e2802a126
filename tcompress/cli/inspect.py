"""tcompress inspect."""

from __future__ import annotations

from pathlib import Path

from tcompress.cli.options import Json, Key, Model


def inspect(model: Model = Path(), key: Key = None, as_json: Json = False) -> None:
    """Show what is in a checkpoint, dense or compressed, from its headers alone.

    Example: tcompress inspect model.safetensors
    """
    from tcompress.checkpoint.opening import open_checkpoint
    from tcompress.cli.console import show
    from tcompress.report.documents import inspection_document
    from tcompress.report.tables import inspection_view
    from tcompress.workflow import inspection

    with open_checkpoint(model, key=key) as checkpoint:
        document = inspection_document(inspection.inspect(checkpoint))
    show(document, inspection_view(document), as_json=as_json)
