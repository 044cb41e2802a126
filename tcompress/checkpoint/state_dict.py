"""Which dict of an unpickled checkpoint holds the tensors, and their names: ``{"net": {"a": {"b": ...}}}`` -> ``a.b``.

The dicts are a stranger's: they may hold themselves, be a million deep, or have keys that are no strings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from tcompress.errors import InputError, SafetyError, UsageError, listed

MAX_DEPTH = 50
MAX_ENTRIES = 200_000
MAX_NAME_CHARACTERS = 4096

_RENAME = "rename it in the state dict and save it again"

_USUAL_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema",
    "net",
    "weights",
    "params",
    "params_ema",
    "generator",
)


def choose_tensors(
    tree: object, key: str | None, path: Path
) -> tuple[str | None, dict[str, torch.Tensor], tuple[str, ...]]:
    """Return the key of the dict with the tensors (None: ``tree`` itself), its tensors, and the names of all else.

    Raises UsageError for a ``key`` that is not there, InputError when there are no tensors, when several dicts
    might be meant, and for names or nesting that no program writes, SafetyError for more entries than any model has.
    """
    if not isinstance(tree, dict):
        raise InputError(f"holds a {type(tree).__name__}, not a dict of tensors; save model.state_dict()", path=path)
    chosen = _usual_key(tree, path) if key is None else key
    beside: list[str] = []
    inside = tree if chosen is None else _follow(tree, chosen, beside, path)
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, None] = {}
    for name, value in _leaves(inside, None, (), path):
        if name in tensors or name in others:
            raise InputError(
                f"is there twice, as a name with dots and as nested dicts; {_RENAME}", path=path, tensor=name
            )
        if len(tensors) + len(others) >= MAX_ENTRIES:
            raise SafetyError(f"holds more than {MAX_ENTRIES} entries; save model.state_dict()", path=path)
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            others[name] = None
    if not tensors:
        where = "" if chosen is None else f" in {_short(chosen)}"
        raise InputError(f"holds no tensors{where}; save model.state_dict()", path=path)
    within = others if chosen is None else [f"{chosen}.{name}" for name in others]
    return chosen, tensors, (*beside, *within)


def _usual_key(tree: dict[object, object], path: Path) -> str | None:
    """Return the entry to descend into, or None when the tensors stand in ``tree`` itself."""
    entries = dict(_entries(tree, path))
    tensors = [value for value in entries.values() if isinstance(value, torch.Tensor)]
    # A single number is no weight: training scripts keep their best accuracy as a tensor beside the state dict.
    if any(tensor.numel() > 1 for tensor in tensors):
        return None
    candidates = [name for name, value in entries.items() if isinstance(value, dict) and _holds_tensors(value)]
    usual = next((name for name in _USUAL_KEYS if name in candidates), None)
    if usual is not None or tensors or not candidates:
        return usual
    if len(candidates) > 1:
        raise InputError(f"holds tensors in several entries: {_named(candidates)}; choose one with --key", path=path)
    return candidates[0]


def _holds_tensors(tree: dict[object, object]) -> bool:
    pending: list[object] = [tree]
    seen = set()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            return True
        if isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(dict.values(value))
    return False


def _follow(tree: dict[object, object], key: str, beside: list[str], path: Path) -> dict[object, object]:
    """Return the dict at ``key``, and add to ``beside`` the names that the way there passes."""
    entries = dict(_entries(tree, path))
    parts = [key] if key in entries else key.split(".")
    prefix = ""
    inside = tree
    for part in parts:
        entries = dict(_entries(inside, path))
        if part not in entries:
            raise UsageError(f"has no entry {prefix}{part}; there are: {_named(list(entries), prefix)}", path=path)
        beside.extend(f"{prefix}{name}" for name in entries if name != part)
        below = entries[part]
        if not isinstance(below, dict):
            raise UsageError(f"its entry {prefix}{part} is a {type(below).__name__}, not a dict of tensors", path=path)
        inside, prefix = below, f"{prefix}{part}."
    return inside


def _leaves(
    tree: dict[object, object], prefix: str | None, parents: tuple[int, ...], path: Path
) -> Iterator[tuple[str, object]]:
    """Yield everything in ``tree`` that is not a dict with entries of its own, under its name with dots."""
    if id(tree) in parents:
        raise InputError("holds a dict that contains itself; save model.state_dict()", path=path)
    if len(parents) >= MAX_DEPTH:
        raise InputError(f"holds dicts nested deeper than {MAX_DEPTH}; save model.state_dict()", path=path)
    for key, value in _entries(tree, path):
        name = key if prefix is None else f"{prefix}.{key}"
        if len(name) > MAX_NAME_CHARACTERS:
            raise InputError(f"has a name of more than {MAX_NAME_CHARACTERS} characters; {_RENAME}", path=path)
        if isinstance(value, dict) and value:
            yield from _leaves(value, name, (*parents, id(tree)), path)
        else:
            yield name, value


def _entries(tree: dict[object, object], path: Path) -> Iterator[tuple[str, object]]:
    """Yield the entries with their keys as strings."""
    # dict.items and not tree.items: the pickle may have given an OrderedDict an attribute of that name.
    for key, value in dict.items(tree):
        if type(key) is not str and type(key) is not int:
            raise InputError(f"has a key that is a {type(key).__name__}, not a string; {_RENAME}", path=path)
        name = str(key)
        if not name.isascii() and any("\ud800" <= character <= "\udfff" for character in name):
            raise InputError(f"has a name that is no Unicode text: {_short(name)}; {_RENAME}", path=path)
        yield name, value


def _named(names: list[str], prefix: str = "") -> str:
    return listed([f"{prefix}{_short(name)}" for name in names], 20) or "none"


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."
