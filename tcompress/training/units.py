"""What is matched with the dense model: single layers, or blocks of them, in the order in which the model calls them.

A unit has the same name in both models. All of it learns that has gradients: factors, biases, and in a block the
normalisations and dense layers too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from tcompress.errors import TaskError, UsageError, listed
from tcompress.runtime.modules import Factorized

LAYER, BLOCK = "layer", "block"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """A module that learns, and those that it learns from: several where layers that share a weight have become one."""

    name: str
    module: nn.Module
    teachers: tuple[nn.Module, ...]


def in_no_unit(student: nn.Module, units: Sequence[Unit]) -> list[str]:
    """Return the names of the compressed layers that learn, and are in no unit."""
    inside = {module for unit in units for module in unit.module.modules()}
    return [name for name, module in _layers(student).items() if module not in inside]


def whole(student: nn.Module, teacher: nn.Module) -> Unit:
    """Return the model itself as a unit."""
    return Unit("", student, (teacher,))


def find_units(student: nn.Module, teacher: nn.Module, by: str, called: Sequence[nn.Module], path: Path) -> list[Unit]:
    """Return what is matched, in the order of first calls.

    by: ``layer``, each compressed layer that learns. ``block``, the innermost module around it that is one of several:
    its own name ends with a number, another module of its class has the same name but for numbers, and it is no
    Sequential or list. Else a glob of module names, part by part. A layer outside of all blocks is a unit of its own.
    Where a module is not called, because another computes with the layer's weight, the unit is the innermost one around
    it that is; a layer for which that is the model itself is in no unit. What lies within another unit is none.

    called: the teacher's modules in the order of their first calls. path: of the task.

    Raises UsageError for a glob that serves no layer or finds a module that is not called, and where nothing is called;
    TaskError for a teacher that has no module of a unit's name.
    """
    modules = dict(student.named_modules())
    layers = list(_layers(student))
    blocks = _blocks(modules, layers, by, path)
    aliases: dict[nn.Module, list[str]] = {}
    for name, module in student.named_modules(remove_duplicate=False):
        aliases.setdefault(module, []).append(name)
    order = {module: at for at, module in enumerate(called)}
    found: dict[str, tuple[int, Unit]] = {}
    for layer in layers:
        start = next((name for name in _outwards(layer) if name in blocks), layer)
        for name in _outwards(start):
            unit = Unit(name, modules[name], _teachers(teacher, aliases[modules[name]], path))
            calls = [order[module] for module in unit.teachers if module in order]
            if calls:
                found[name] = (min(calls), unit)
                break
            if name in blocks and by != BLOCK:
                raise UsageError(f"by={by} finds {name}, which the model does not call; name what it calls", path=path)
    if not found:
        raise UsageError("the model calls no module that holds a compressed layer; nothing can be matched", path=path)
    outer = [each for name, each in found.items() if not any(around in found for around in _outwards(_parent(name)))]
    return [unit for _, unit in sorted(outer, key=lambda each: each[0])]


def _layers(model: nn.Module) -> dict[str, Factorized]:
    """Return the compressed layers that learn, each once."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Factorized)}
    return {name: each for name, each in layers.items() if any(p.requires_grad for p in each.factors.parameters())}


def _blocks(modules: Mapping[str, nn.Module], layers: Sequence[str], by: str, path: Path) -> set[str]:
    """Return the names of the modules that are blocks."""
    if by == LAYER:
        return set()
    if by == BLOCK:
        return _repeated(modules)
    around = {each for layer in layers for each in _outwards(layer)}
    found = {name for name in around if _fits(name, by)}
    if not found:
        known = listed(sorted(around), 10)
        raise UsageError(f"by={by}: no module around a compressed layer has such a name; there are {known}", path=path)
    return found


def _fits(name: str, glob: str) -> bool:
    """Tell whether a module's name fits a glob, part by part: ``*`` is no dot."""
    parts, globs = name.split("."), glob.split(".")
    return len(parts) == len(globs) and all(fnmatchcase(*each) for each in zip(parts, globs, strict=True))


def _repeated(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of modules with a number at their end that are not the only one of their class."""
    alike: dict[tuple[str, type], list[str]] = {}
    for name, module in modules.items():
        if name[-1:].isdigit() and not isinstance(module, (*_CONTAINERS, Factorized)):
            alike.setdefault((re.sub(r"\d+", "0", name), type(module)), []).append(name)
    return {name for group in alike.values() if len(group) > 1 for name in group}


def _outwards(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it, but for the model itself."""
    while name:
        yield name
        name = _parent(name)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _teachers(teacher: nn.Module, names: Sequence[str], path: Path) -> tuple[nn.Module, ...]:
    """Return the teacher's modules of these names, each once."""
    found: dict[int, nn.Module] = {}
    for name in names:
        try:
            module = teacher.get_submodule(name)
        except AttributeError as error:
            way_out = "to be matched it has the modules of model()"
            raise TaskError(f"the teacher has no module {name}; {way_out}", path=path) from error
        found[id(module)] = module
    return tuple(found.values())
