"""Factorised layers as plain ones, whose weights an ONNX model holds: the factors of each, or its dense weight."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tcompress.checkpoint.manifest import Entry
from tcompress.formats.addends import SumOfTerms
from tcompress.formats.base import Factorization
from tcompress.formats.cp import CPTensor
from tcompress.formats.sparse import SparseMatrix
from tcompress.formats.sparse_product import SparseFactors
from tcompress.formats.staged import StagedFactorization
from tcompress.formats.svd import SpatialPair
from tcompress.runtime.install import collect, factorized, put
from tcompress.runtime.modules import Factorized, FactorizedConv, FactorizedEmbedding
from tcompress.runtime.packed import Packed, assemble, held_values, stored_in, weight_of
from tcompress.workflow.onnx_modules import Padding, SharedByGroups, Stand, Terms

_CONV = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_NEVER_CALLED = "the model's code takes its weight instead of calling it"
_NOWHERE = "stands in no layer that can run through factors"


@dataclass(frozen=True)
class ExportedLayer:
    """One compressed layer in the ONNX model.

    name: as in the checkpoint. format: its name. reason: why its weight is there dense; None where its factors are.
    operations: multiplications per position, an embedding's none. dense_operations: of the dense weight.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    reason: str | None
    operations: int
    dense_operations: int


@dataclass(frozen=True)
class _Map:
    """A weight of one of the layers. geometry: which part of a convolution's is its own: all, none, first or others."""

    weight: Tensor
    geometry: str
    groups: int = 1


class Plain:
    """Takes the factorised layers out of a model. Equal weights, as those of tied layers, become one parameter."""

    def __init__(self, model: nn.Module, called: Collection[nn.Module]) -> None:
        """Take the layers of a model. called: those that its code calls; it may use just the weight of another."""
        self._model, self._called = model, called
        self._parameters: dict[tuple[Any, ...], nn.Parameter] = {}

    def replace(
        self, entries: Mapping[str, tuple[str, Entry]], problems: Mapping[str, str]
    ) -> tuple[ExportedLayer, ...]:
        """Put plain layers in the place of factorised ones; say what became of each of ``entries``.

        entries: name in the model -> name in the checkpoint, and the entry of its manifest. problems: name in the
        model -> why there is no factorised layer.
        """
        found = collect(self._model)
        made: dict[int, tuple[nn.Module, str | None, int]] = {}
        rows = []
        for name, layer in found.items():
            if id(layer) not in made:
                made[id(layer)] = self._plain(layer)
            put(self._model, name.rpartition(".")[0], made[id(layer)][0])
        for name, (original, entry) in entries.items():
            dense = math.prod(entry.shape)
            _, reason, operations = (
                made[id(found[name])] if name in found else (None, problems.get(name, _NOWHERE), dense)
            )
            dense = 0 if name in found and isinstance(found[name], FactorizedEmbedding) else dense
            rows.append(ExportedLayer(original, entry.format, entry.shape, reason, operations, dense))
        return tuple(rows)

    def _plain(self, layer: Factorized) -> tuple[nn.Module, str | None, int]:
        """Return what takes a layer's place, why it is dense or None, and its multiplications."""
        factors = assemble(layer.setting, layer.factors.shape, self._unpacked(layer), layer.like.dtype)
        reason = _obstacle(layer, factors) if layer in self._called else _NEVER_CALLED
        if reason is not None:
            is_embedding = isinstance(layer, FactorizedEmbedding)
            return self._dense(layer, factors), reason, 0 if is_embedding else math.prod(factors.shape)
        return self._through(layer, factors, layer.bias), None, factors.operations(**_counted(layer))

    def _through(self, layer: Factorized, factors: Factorization, bias: nn.Parameter | None) -> nn.Module:
        """Return the way through factors that serve as the layer's, or add to them."""
        if isinstance(factors, SumOfTerms):
            first, *others = factors.members()
            terms = [self._through(layer, first, bias), *(self._through(layer, term, None) for term in others)]
            return Terms(terms, layer)
        maps = _maps(factors)
        if maps is not None:
            return self._chain(layer, maps, bias)
        made = factorized(layer, factors, layer.setting, like=layer.like, cache="never", origin=layer.origin)
        made.bias = bias
        return made

    def _unpacked(self, layer: Factorized) -> dict[str, nn.Parameter | Packed]:
        names, dtype = tuple(stored_in(layer.factors)), layer.like.dtype
        return {name: self._parameter(values.to(dtype)) for name, values in held_values(layer.factors, names)}

    def _parameter(self, values: Tensor) -> nn.Parameter:
        values = values.detach().contiguous()
        key = (
            values.dtype,
            tuple(values.shape),
            hashlib.sha256(values.flatten().view(torch.uint8).numpy().tobytes()).digest(),
        )
        if key not in self._parameters:
            self._parameters[key] = nn.Parameter(values.clone(), requires_grad=False)
        return self._parameters[key]

    def _chain(self, layer: Factorized, maps: Mapping[str, _Map], bias: nn.Parameter | None) -> nn.Module:
        """Return layers one after the other; the last has the bias, and all but the last serve every group alike."""
        *firsts, last = maps
        if not isinstance(layer, FactorizedConv):
            parts = {name: self._linear(maps[name].weight, None) for name in firsts}
            return Stand({**parts, last: self._linear(maps[last].weight, bias)}, layer)
        conv: Any = layer
        parts = {name: self._conv(maps[name].weight, maps[name].groups, _part(conv, maps[name])) for name in firsts}
        out_map = self._conv(maps[last].weight, conv.groups, _part(conv, maps[last]), bias)
        if conv.groups > 1:
            grouped = SharedByGroups(conv.groups, nn.Sequential(OrderedDict(parts)), out_map)
            parts, last, out_map = {}, "grouped", grouped
        if conv.padding_mode != "zeros":
            parts = {"padding": Padding(conv._reversed_padding_repeated_twice, conv.padding_mode), **parts}
        return Stand({**parts, last: out_map}, layer)

    def _dense(self, layer: Factorized, factors: Factorization) -> nn.Module:
        # Not rounded to the type of the file in between, as a layer that keeps its dense weight does: torch's answers
        # come from layers that keep none.
        weight = weight_of(factors, torch.float32).to(layer.like.dtype)
        if isinstance(layer, FactorizedConv):
            conv: Any = layer
            geometry = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            return self._conv(weight, conv.groups, geometry, conv.bias)
        if not isinstance(layer, FactorizedEmbedding):
            return self._linear(weight, layer.bias)
        made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, device="meta")
        made.weight = self._parameter(weight)
        return made

    def _linear(self, weight: Tensor, bias: nn.Parameter | None) -> nn.Module:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        made.weight = self._parameter(weight)
        if bias is not None:
            made.bias = bias
        return made

    def _conv(
        self, weight: Tensor, groups: int, geometry: Mapping[str, Any], bias: nn.Parameter | None = None
    ) -> nn.Module:
        out, in_, *kernel = weight.shape
        kind: Any = _CONV[weight.ndim]
        made = kind(in_ * groups, out, tuple(kernel), groups=groups, bias=bias is not None, device="meta", **geometry)
        made.weight = self._parameter(weight)
        if bias is not None:
            made.bias = bias
        found: nn.Module = made
        return found


def _obstacle(layer: Factorized, factors: Factorization) -> str | None:
    """Say why the dense weight serves better than the factors; None when it does not."""
    if isinstance(layer, FactorizedEmbedding):
        return "an embedding's rows are looked up, not computed"
    if any(isinstance(part, SparseMatrix | SparseFactors) for part in factors.modules()):
        return "ONNX has no product with sparse matrices"
    geometry: dict[str, Any] = {}
    if isinstance(layer, FactorizedConv):
        geometry = {"stride": layer.stride, "groups": layer.groups}
        by_name = isinstance(layer.padding, str) and layer.padding_mode == "zeros"
        if by_name and isinstance(factors, SpatialPair | SumOfTerms):
            return f"its padding is {layer.padding!r}, which its factors cannot share out"
    return None if factors.saves(**geometry) else "its factors would take as many multiplications, or more"


def _counted(layer: Factorized) -> dict[str, int]:
    if not isinstance(layer, FactorizedConv):
        return {}
    conv: Any = layer
    return {"groups": conv.groups, "steps": math.prod(conv.stride)}


def _maps(factors: Factorization) -> dict[str, _Map] | None:
    """Return the layers that a factorization is, first to last; None for one that runs in its own way."""
    ones = (1,) * (len(factors.shape) - 2)

    def point(matrix: Tensor) -> _Map:
        return _Map(matrix.reshape(*matrix.shape, *ones), "none")

    if isinstance(factors, SpatialPair):
        out, in_, height, *width = factors.shape
        r = factors.left.shape[1]
        column = factors.left.reshape(out, height, r).movedim(1, 2).reshape(out, r, height, *ones[1:])
        return {
            "along_others": _Map(factors.right.reshape(r, in_, 1, *width), "others"),
            "along_first": _Map(column, "first"),
        }
    if isinstance(factors, StagedFactorization):
        stages = factors.stages().shortened()
        if stages.in_map is None:
            return {"in_map": _Map(stages.middle, "all"), "out_map": point(stages.out_map)}
        middle = _Map(stages.middle, "all")
        return {"in_map": point(stages.in_map), "middle": middle, "out_map": point(stages.out_map)}
    if isinstance(factors, CPTensor) and len(factors.folding.out_modes) == 1:
        out_map, in_map, *kernels = factors.factors
        if not kernels:
            return {"in_map": point(in_map.T), "out_map": point(out_map * factors.weights)}
        kernel = (kernels[0] * factors.weights).T.reshape(-1, 1, *factors.shape[2:])
        depthwise = _Map(kernel, "all", groups=len(kernel))
        return {"in_map": point(in_map.T), "depthwise": depthwise, "out_map": point(out_map)}
    return None


def _part(layer: Any, own: _Map) -> dict[str, Any]:
    """Return stride, padding and dilation of one of the convolutions that a layer becomes."""
    whole = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    neutral: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1}
    others = len(layer.stride) - 1
    if layer.padding_mode != "zeros":
        whole["padding"] = (0,) * (others + 1)
    match own.geometry:
        case "all":
            return whole
        case "first":
            return {name: (whole[name][0], *[none] * others) for name, none in neutral.items()}
        case "others":
            return {name: (none, *whole[name][1:]) for name, none in neutral.items()}
    return neutral
