"""Factors as they learn and as they are stored: a model goes from one form to the other and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tcompress.encodings import CODED, Coding, value_type
from tcompress.errors import FormatError
from tcompress.formats import Format, make
from tcompress.formats.base import Factorization
from tcompress.runtime.install import collect
from tcompress.runtime.learning import Learning, Pruned
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import Held, Packed, PackedFactorization, assemble, held_in, stored_in
from tcompress.training.twin import Twin
from tcompress.workflow.fitting import encoded
from tcompress.workflow.saving import type_of


def let_learn(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """Give the factorised layers of a loaded model factors that learn in float32, whatever they are stored as.

    The zeros of sparse factors stay zero. What layers share they share still. frozen: layers that do not learn, by
    the names of their weights; they take a form in which a cast of the model does not change what they are stored as.
    """
    once: dict[int, Held] = {}
    done: set[int] = set()
    for name, layer in collect(model).items():
        if id(layer) in done:
            continue
        done.add(id(layer))
        sparse = _sparse_factors(layer)
        held = {
            factor: once.setdefault(id(stored), _learning(stored, factor in sparse, learns=name not in frozen))
            for factor, stored in stored_in(layer.factors).items()
        }
        if any(isinstance(each, Learning) for each in held.values()):
            layer.hold(PackedFactorization(layer.setting, layer.factors.shape, held))


def see_codes(model: nn.Module) -> None:
    """Let factors that are stored as codes be what these stand for, with the scales that their values now have."""
    for factor in coded(model):
        coding, parts = _parts_of(factor, factor.learnt().detach().cpu())
        if coding.values is not None:
            factor.see_codes(coding.steps(parts, factor.shape), coding.levels(parts))


def coded(model: nn.Module) -> list[Learning]:
    """Return the factors that learn and are stored as codes."""
    found = [each for each in model.modules() if isinstance(each, Learning)]
    return [each for each in found if each.dtype in CODED and each.values.requires_grad]


def learning_factors(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all factors that learn, each once."""
    layers = [module for module in model.modules() if isinstance(module, Factorized)]
    found = {id(each): each for layer in layers for each in layer.factors.parameters() if each.requires_grad}
    return list(found.values())


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Give the layers their factors as they would be stored, rounded and encoded; in the end those that learn again.

    The settings of layers that are being pruned, or whose amount is learnt, tell what they have come to.
    Raises NumericalError for a factor that cannot be stored.
    """
    layers = [module for module in model.modules() if isinstance(module, Factorized)]
    learning = [(layer, layer.factors, layer.setting) for layer in layers if _learns(layer.factors)]
    once: dict[int, nn.Parameter | Packed] = {}
    of_twins: dict[int, dict[str, nn.Parameter | Packed]] = {}
    try:
        for layer, factors, setting in learning:
            if isinstance(factors, Twin):
                held = of_twins.setdefault(id(factors), factors.held())
                found = assemble(setting, factors.shape, held, layer.like.dtype).to(layer.like.device)
                layer.hold(found)
                layer.setting = factors.setting
                continue
            layer.hold(_stored(layer, factors, once))
            layer.setting = _as_pruned(setting, factors)
        yield
    finally:
        for layer, factors, setting in learning:
            layer.hold(factors)
            layer.setting = setting


def _learns(factors: Factorization) -> bool:
    return isinstance(factors, Twin) or any(isinstance(held, Learning) for held in held_in(factors).values())


def _learning(stored: nn.Parameter | Packed, is_sparse: bool, *, learns: bool) -> Held:
    """Return what learns in a factor's place; the factor itself where it does, or is not to and cannot be cast."""
    if isinstance(stored, Packed):
        if not learns and stored.coding.values is not None:
            return stored
        is_sparse = is_sparse or bool(stored.coding.support.part_names)
        parts = None if stored.coding.values is None else {name: part.cpu() for name, part in stored.parts().items()}
        with torch.no_grad():
            found = Learning(stored(), type_of(stored), stored.coding, fixed=is_sparse, parts=parts)
        return found.requires_grad_(learns)
    has_zeros = is_sparse and bool((stored == 0).any())
    if stored.dtype.itemsize >= torch.float32.itemsize and not has_zeros:
        return stored
    return Learning(stored, stored.dtype, None, fixed=has_zeros).requires_grad_(learns)


def _stored(layer: Factorized, factors: Factorization, once: dict[int, nn.Parameter | Packed]) -> Factorization:
    held = {}
    for name, each in held_in(factors).items():
        if isinstance(each, Learning) and id(each) not in once:
            once[id(each)] = _encoded(each)
        held[name] = once[id(each)] if isinstance(each, Learning) else each
    found = assemble(layer.setting, factors.shape, held, layer.like.dtype)
    return found.to(layer.like.device)


def _as_pruned(setting: Format, factors: Factorization) -> Format:
    """Return the setting with the density of what is kept, where there is a factor that is pruned."""
    for held in held_in(factors).values():
        if isinstance(held, Pruned):
            return make(type(setting), {**setting.options(), setting.size_option: held.kept / held.mask.numel()})
    return setting


def _encoded(factor: Learning) -> nn.Parameter | Packed:
    """Return a factor in the type and, of a sparse one, the kind of coding that it was read from."""
    values = factor.learnt().detach().cpu().to(value_type(factor.dtype))
    if factor.coding is None and not factor.is_sparse:
        return nn.Parameter(values)
    coding, parts = _parts_of(factor, values)
    return nn.Parameter(parts[""]) if coding.is_plain_tensor else Packed(coding, parts, factor.shape)


def _parts_of(factor: Learning, values: Tensor) -> tuple[Coding, Mapping[str, Tensor]]:
    """Return how a factor of these values, on the CPU, is stored: as it was read, where these are what it was.

    A sparse value whose code is zero is none of the factor's values any more: encoded without it, those behind it would
    come into other groups, with other scales.
    """
    coding, parts = factor.coding, factor.parts
    if coding is not None and parts is not None and torch.equal(values, coding.decode(parts, factor.shape)):
        return coding, parts
    found = encoded(values, factor.dtype, is_sparse=factor.is_sparse)
    return found.coding, found.parts


def _sparse_factors(layer: Factorized) -> set[str]:
    """Return the factors of which a format keeps some values only, whatever they are stored as."""
    try:
        specs = layer.setting.factor_specs(layer.factors.shape, torch.float32)
    except FormatError:
        return set()
    return {name for name, spec in specs.items() if spec.nonzeros is not None and spec.nonzeros < spec.values}
