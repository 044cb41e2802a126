"""A report as a file, whose suffix says what it becomes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import tempfile
from pathlib import Path

from tcompress.errors import OutputError, UsageError
from tcompress.report.documents import Document
from tcompress.report.markdown import compression_markdown

REPORT_SUFFIXES = (".json", ".md")
PLAN_SUFFIXES = (".json",)


def check_path(path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise UsageError or OutputError when a document could not be written there, before any work is done."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise UsageError(f"must end with {' or '.join(suffixes)}", path=path)
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", path=path)


def check_plots(folder: Path) -> None:
    """Raise UsageError without matplotlib, OutputError when no figures could be written there, before any work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError('--plots needs matplotlib: pip install "tcompress[plots]"')
    if folder.exists() and not folder.is_dir():
        raise OutputError("is a file; figures go into a folder", path=folder)
    if not folder.parent.is_dir():
        raise OutputError(f"the folder {folder.parent} does not exist", path=folder)
    try:
        # Tried, not asked: permissions say yes to root even where no file can be made.
        if folder.exists():
            with tempfile.TemporaryFile(dir=folder):
                pass
        else:
            folder.mkdir()
            folder.rmdir()
    except OSError as error:
        raise OutputError(f"cannot be written to ({error.strerror})", path=folder) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there completely or not at all; one of that name is replaced.

    Raises OutputError when it cannot be written.
    """
    draft = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with draft.open("xb") as file:
            file.write(content)
        draft.replace(path)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", path=path) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def write_report(path: Path, document: Document) -> None:
    """Write the report of ``compress``. Raises OutputError when it cannot be written."""
    _write(path, compression_markdown(document) if path.suffix == ".md" else json_text(document))


def write_plan(path: Path, plan: Document) -> None:
    """Write a plan to be edited. Raises OutputError when it cannot be written."""
    _write(path, json_text(plan))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", path=path) from error


def json_text(document: Document) -> str:
    """Return a document as indented JSON."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
