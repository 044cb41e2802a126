"""The names in a compressed file beside those of a transformers model, which renames, merges and ties as it loads."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch

from tcompress.errors import InputError, listed
from tcompress.transformers.vacancies import Vacancy
from tcompress.workflow.decoding import CompressedView
from tcompress.workflow.matching import Place, places_in

try:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
except ImportError:  # transformers 4, which renames nothing but prefixes
    rename_source_key = None

WAY_OUT = "`tcompress decompress` makes a folder of it that every loader reads"
_log = logging.getLogger(__name__)


class Names:
    """Where the tensors of a compressed file belong in a model that has no data yet.

    Raises InputError when a compressed layer has no place of its own.
    """

    def __init__(self, model: Any, dense: CompressedView) -> None:
        self._model, self._dense = model, dense
        self._expected = model.state_dict()
        self._rename = _renamer(model, self._expected)
        self._given: dict[str, str] = {}  # name in the model -> in the file
        found, merged, dropped = set(), [], []
        for name in dense.infos:
            target, is_merged = self._rename(name)
            found.add(target)
            if target not in self._expected:
                dropped += [name] * self._is_compressed(name)
            elif not is_merged:
                self._given[target] = name
            elif self._is_compressed(name):
                merged.append(name)
        if merged:
            raise self._misfit(f"transformers merges these of its compressed layers with others: {listed(merged)}")
        self._check_dropped(dropped, [name for name in self._expected if name not in found])

    def parts(self) -> frozenset[str]:
        """Return the names under which a loader may meet the parts of compressed layers: it knows none of them."""
        stored = [part for parts in (*self._dense.stored.values(), *self._dense.shared.values()) for part in parts]
        prefix = f"{self._model.base_model_prefix}."
        return frozenset(
            name for part in stored for name in (part, self._rename(part)[0], prefix + part, part.removeprefix(prefix))
        )

    def types(self) -> dict[str, tuple[torch.dtype, str | None]]:
        """Return the type that every tensor of the model is to have, and its name in the file where it stands there."""
        return {
            name: (_dtype(self._model, name, held.dtype), self._given.get(name))
            for name, held in self._expected.items()
            if held.is_floating_point()
        }

    def vacancies(self, ties: Mapping[str, str]) -> list[Vacancy]:
        """Return what is to wait for compressed layers.

        ties: of tensors that are one after loading, second -> first; those that are one already need not be in it.
        Raises InputError for shapes that differ and for ties between a dense and a compressed tensor.
        """
        places, found = places_in(self._model), []
        groups: dict[int, list[str]] = defaultdict(list)
        for name in places:
            groups[places[ties.get(name, name)].identity].append(name)
        for names in groups.values():
            held = {name: self._first(self._given[name]) for name in names if name in self._given}
            layers = [layer for layer in dict.fromkeys(held.values()) if layer in self._dense.manifest.layers]
            if layers and set(held.values()) != set(layers):
                raise self._misfit(f"{listed(list(held))} are one in the model, but only a part of them is compressed")
            for layer in layers:
                here = {name: places[name] for name in names if held.get(name, layers[0]) == layer}
                found.append(self._vacancy(layer, here))
        return found

    def _vacancy(self, layer: str, places: Mapping[str, Place]) -> Vacancy:
        entry = self._dense.manifest.layers[layer]
        for name, place in places.items():
            if place.shape != entry.shape:
                raise self._misfit(f"{layer} has shape {entry.shape}, and {name} in the model {place.shape}")
            if place.attribute not in place.module._parameters:
                raise self._misfit(f"{name} is no parameter of the model")
        name, place = next(iter(places.items()))
        return Vacancy(layer, places, _dtype(self._model, name, place.dtype))

    def _check_dropped(self, dropped: list[str], missing: Collection[str]) -> None:
        """Raise InputError unless the model has no use for these layers, as a task's head where another is wanted."""
        if not dropped:
            return
        if not any(self._is_compressed(name) for name in self._given.values()):
            raise self._misfit("none of its compressed layers is in the model")
        ends = {_end(name): name for name in missing}
        for name in dropped:
            if _end(name) in ends:
                raise self._misfit(f"{name} seems to be {ends[_end(name)]} of the model under another name")
        _log.warning("%s has no use for these compressed layers: %s", type(self._model).__name__, listed(dropped))

    def _is_compressed(self, name: str) -> bool:
        return self._first(name) in self._dense.manifest.layers

    def _first(self, name: str) -> str:
        return self._dense.manifest.tied.get(name, name)

    def _misfit(self, problem: str) -> InputError:
        path, model = self._dense.checkpoint.path, type(self._model).__name__
        return InputError(f"does not fit the model {model}: {problem}; {WAY_OUT}", path=path)


def _renamer(model: Any, expected: Mapping[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """Return what gives a name in the model for one in a file, and whether its tensor is merged with others there."""
    prefix = model.base_model_prefix
    if rename_source_key is None:
        renamed = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return lambda name: (
            next((each for each in _candidates(name, prefix, renamed) if each in expected), name),
            False,
        )
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        return target, pattern is not None

    return rename


def _candidates(name: str, prefix: str, renamed: Mapping[str, str]) -> Iterator[str]:
    for pattern, replacement in renamed.items():
        other, count = re.subn(pattern, replacement, name)
        if count:
            yield other
            break
    yield name
    if prefix:
        yield f"{prefix}.{name}"
        yield name.removeprefix(f"{prefix}.")


def _dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a tensor, which models keep wide where half a type would not do."""
    if rename_source_key is not None:  # transformers 5; the plan was an attribute at first, with all types in it
        plan = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else getattr(model, "dtype_plan", None)
        found = (wide for part, wide in (plan or {}).items() if re.search(part.replace("*", ".*"), name))
        return next(found, dtype)
    wide = set(model._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    if dtype in {torch.float16, torch.bfloat16}:
        wide |= set(model._keep_in_fp32_modules_strict or ())
    return torch.float32 if any(re.search(rf"(^|\.){part}($|\.)", name) for part in wide) else dtype


def _end(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-3:])
