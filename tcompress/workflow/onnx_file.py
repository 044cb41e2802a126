"""A torch model as an ONNX file, and what ONNX Runtime makes of it. Their packages are an extra, imported late."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tcompress.errors import UsageError, VerifyError
from tcompress.workflow.latency import Inputs

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_BYTES = 2 * 10**9  # a Protocol Buffers file ends at 2 GiB, names and graph included
_FLOATS = (1, 10)  # float32 and float16, as ONNX numbers its types
_LOUD = (
    "torch.onnx._internal.exporter._registration",  # tells of every operator of torchvision, where that is missing
    "torch.fx.experimental.symbolic_shapes",
)


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model in bytes. operators: how many nodes of each kind there are, by name."""

    content: bytes
    operators: Mapping[str, int]
    opset: int


def require_packages() -> None:
    """Raise UsageError when a package that ONNX needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"ONNX needs {', '.join(missing)}: pip install 'tcompress[onnx]'")


def exported(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> OnnxModel:
    """Return a model as ONNX, traced with these inputs; dynamic_shapes as ``torch.export.export`` takes them.

    The same model gives the same bytes. Nothing is left in them of where the model's code lies. Raises whatever torch
    does where it cannot follow the model.
    """
    with _quiet(), torch.no_grad():
        program: Any = torch.onnx.export(
            model,
            inputs.arguments,
            kwargs=dict(inputs.named),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            verbose=False,
        )
    proto = program.model_proto
    _strip(proto)
    _name_weights(proto.graph, model)
    operators = Counter(node.op_type for graph in (proto.graph, *proto.functions) for node in graph.node)
    opset = next(each.version for each in proto.opset_import if each.domain == "")
    return OnnxModel(proto.SerializeToString(deterministic=True), dict(sorted(operators.items())), opset)


class OnnxSession:
    """An ONNX file in ONNX Runtime on the CPU."""

    def __init__(self, path: Path, model: Path) -> None:
        """Load it. path: the file. model: what it is called in messages. Raises VerifyError when it is refused."""
        runtime = importlib.import_module("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, and need not be printed as well
        options.intra_op_num_threads = torch.get_num_threads()
        self._model = model
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise self._refused("does not accept the model", error) from error

    @property
    def takes_any_batch(self) -> bool:
        """Whether the first size of its first input is left open."""
        shapes = [entry.shape for entry in self._session.get_inputs()]
        return bool(shapes) and bool(shapes[0]) and not isinstance(shapes[0][0], int)

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Return the model's tensors for a call, in their order. Raises VerifyError when it cannot run."""
        names = [entry.name for entry in self._session.get_inputs()]
        fed = {name: value for name, value in inputs.named.items() if isinstance(value, Tensor) and name in names}
        rest = [name for name in names if name not in fed]
        values = tensors_in(inputs.arguments) + tensors_in([v for k, v in inputs.named.items() if k not in fed])
        if len(rest) > len(values):
            raise VerifyError(
                f"needs inputs {', '.join(rest)}, of which the task gives {len(values)}", path=self._model
            )
        fed |= dict(zip(rest, values, strict=False))
        try:
            found = self._session.run(None, {name: value.detach().numpy() for name, value in fed.items()})
        except Exception as error:
            raise self._refused("cannot run the model", error) from error
        return [torch.from_numpy(each.copy()) for each in found]

    def _refused(self, what: str, error: Exception) -> VerifyError:
        return VerifyError(f"ONNX Runtime {what}: {' '.join(str(error).split())[:500]}", path=self._model)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in whatever a model takes or gives, in torch's order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest |found - expected| over the largest |expected|, output by output; inf if they do not match."""
    if [tuple(each.shape) for each in found] != [tuple(each.shape) for each in expected]:
        return float("inf")
    return max((_difference(*pair) for pair in zip(found, expected, strict=True)), default=0.0)


def _difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())  # infinities are the same, or far apart
    apart = torch.where(same, 0.0, found - expected).abs()
    if not apart.isfinite().all():
        return float("inf")
    largest = float(apart.max()) if apart.numel() else 0.0
    finite = expected[expected.isfinite()].abs()
    return largest / scale if (scale := float(finite.max()) if finite.numel() else 0.0) else largest


def _graphs(holder: Any) -> Iterator[Any]:
    """Yield a graph, or a function, and all graphs inside of its nodes."""
    yield holder
    for node in holder.node:
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _graphs(graph)


def _strip(proto: Any) -> None:
    """Take out what names the files and lines of the code that made the model."""
    _clear(proto)
    for top in (proto.graph, *proto.functions):
        for graph in _graphs(top):
            _clear(graph)
            parts = (getattr(graph, kind, ()) for kind in ("node", "value_info", "input", "output", "initializer"))
            for part in chain.from_iterable(parts):
                _clear(part)
            for attribute in chain.from_iterable(node.attribute for node in graph.node):
                _clear(attribute)


def _name_weights(graph: Any, model: nn.Module) -> None:
    """Give weights that torch's exporter transposed or reshaped the names of the parameters that they come from."""
    outputs = {each.name for each in graph.output}
    names = outputs | {each.name for each in graph.initializer}
    parameters = dict(model.named_parameters())
    nameless = {
        each.raw_data: each.name
        for each in graph.initializer
        if each.data_type in _FLOATS and each.name not in {*parameters, *outputs}
    }
    new: dict[str, str] = {}
    for name, values in parameters.items():
        turned = [(f"{name}.T", values.T)] if values.dim() == 2 else []
        for wanted, tensor in ((name, values), *turned) if values.numel() > 1 else ():
            old = nameless.get(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            if old is not None and old not in new and wanted not in names:
                new[old] = wanted
    for each in (*graph.initializer, *graph.value_info):
        each.name = new.get(each.name, each.name)
    for node in chain.from_iterable(inner.node for inner in _graphs(graph)):
        node.input[:] = [new.get(name, name) for name in node.input]


def _clear(part: Any) -> None:
    for field in ("doc_string", "metadata_props"):
        if field in part.DESCRIPTOR.fields_by_name:
            part.ClearField(field)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user what torch's exporter says of itself."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    try:
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        said = io.StringIO()  # a graph that cannot be exported is printed several times
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
