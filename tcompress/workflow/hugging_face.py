"""The config.json of a transformers folder: it tells a loader that knows factors where the compressed weights are.

Our entry is put in and taken out as text, so that a folder that is compressed and decompressed has its own bytes again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tcompress.checkpoint.reader import Checkpoint

CONFIG = "config.json"
METHOD = "tcompress"
STEM = "model.tcompress"  # not the usual name: a loader that does not know factors must find no weights at all
WEIGHTS = (f"{STEM}.safetensors.index.json", f"{STEM}.safetensors")  # an index before a single file
MAX_CONFIG_BYTES = 8 << 20
_KEY = "quantization_config"
_SPACE = b" \t\r\n"


def announce(folder: Path, checkpoint: Checkpoint) -> list[str]:
    """Name the compressed weights of a folder in its config.json, if that is one of transformers; return what to know.

    checkpoint: the dense one that the folder was made from.
    """
    path = folder / CONFIG
    weights = weights_in(folder)
    if weights is None or not path.is_file():
        return []
    found = _parse(path)
    if isinstance(found, str):
        return [_left_alone(found)]
    text, config = found
    if "model_type" not in config and "architectures" not in config:
        return []
    if _KEY in config:
        return [_left_alone(f"it has a {_KEY} of its own")]
    settings = {"quant_method": METHOD, "weights": weights}
    if not (config.get("dtype") or config.get("torch_dtype")):
        settings |= _dtype(checkpoint)
    head = text[: text.rindex(b"}")].rstrip(_SPACE)
    path.write_bytes(head + _entry(settings) + text[len(head) :])
    return []


def withdraw(folder: Path) -> None:
    """Take our entry out of a folder's config.json again; one that has none stays as it is."""
    path = folder / CONFIG
    found = _parse(path) if path.is_file() else ""
    if isinstance(found, str):
        return
    text, config = found
    settings = config.pop(_KEY, None)
    if not is_ours(settings):
        return
    entry = _entry(settings)
    if text.count(entry) == 1:
        path.write_bytes(text.replace(entry, b""))
    else:  # somebody wrote the file anew
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def is_ours(settings: object) -> bool:
    """Tell whether a quantization_config is the one that ``announce`` writes."""
    return isinstance(settings, dict) and settings.get("quant_method") == METHOD


def weights_in(folder: Path) -> str | None:
    """Return the name of the compressed weights in a folder, the index where there is one."""
    return next((name for name in WEIGHTS if (folder / name).is_file()), None)


def _parse(path: Path) -> tuple[bytes, dict[str, Any]] | str:
    """Return text and content of a stranger's file, or why it has none."""
    if path.stat().st_size > MAX_CONFIG_BYTES:
        return f"it is larger than {MAX_CONFIG_BYTES} bytes"
    text = path.read_bytes()
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return "its JSON cannot be read"
    return (text, config) if isinstance(config, dict) else "its JSON is not an object"


def _entry(settings: Mapping[str, Any]) -> bytes:
    written = json.dumps(settings, indent=2).replace("\n", "\n  ")
    return f',\n  "{_KEY}": {written}'.encode()


def _dtype(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the type that transformers would take from the first dense tensor: stored factors may be of another."""
    for _, info in checkpoint.items():
        dtype = info.dtype.torch
        if dtype is not None and dtype.is_floating_point:
            return {"dtype": str(dtype).removeprefix("torch.")}
    return {}


def _left_alone(reason: str) -> str:
    return f"{CONFIG} was copied as it is ({reason}): transformers will not find the compressed weights by it"
