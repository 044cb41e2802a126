"""A report as a file, whose suffix says what it becomes."""

from __future__ import annotations

import json
from pathlib import Path

from tcompress.errors import OutputError, UsageError
from tcompress.report.documents import Document
from tcompress.report.markdown import compression_markdown

SUFFIXES = (".json", ".md")


def check_report_path(path: Path) -> None:
    """Raise UsageError or OutputError when a report could not be written there, before any work is done."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"a report ends with {' or '.join(SUFFIXES)}", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", path=path)


def write_report(path: Path, document: Document) -> None:
    """Write the report of ``compress``. Raises OutputError when it cannot be written."""
    text = compression_markdown(document) if path.suffix == ".md" else json_text(document)
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"the report cannot be written ({error.strerror})", path=path) from error


def json_text(document: Document) -> str:
    """Return a document as indented JSON."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
