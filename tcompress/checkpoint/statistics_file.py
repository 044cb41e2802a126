"""Statistics of a model's layers on calibration data, as one safetensors file: written whole, read with distrust.

Letters: W (out, n) = a layer's weight as its matrix; x (n,) = its input and y (out,) = its output at a position: a
token, or a patch of an image; s = the sensitivity, (out,).

Of layer NAME the file has float32 tensors NAME.moment, NAME.mean and NAME.sensitivity; what they were measured on
stands as JSON under one metadata key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tcompress.checkpoint.dtypes import BY_TORCH
from tcompress.checkpoint.layers import LayerKind
from tcompress.checkpoint.manifest import compact_json
from tcompress.checkpoint.mapped import bytes_of
from tcompress.checkpoint.output import Output
from tcompress.checkpoint.safetensors_file import SafetensorsFile, parse_object
from tcompress.checkpoint.writer import Piece, write_file
from tcompress.errors import InputError, NumericalError, UnsupportedError
from tcompress.version import __version__

METADATA_KEY = "tcompress_statistics"
VERSION = 1
SENSITIVITIES = ("loss", "output")
_F32 = BY_TORCH[torch.float32]
_CHECKED = 512  # rows of a matrix at a time
_WAY_OUT = "make one with `tcompress calibrate`"


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer meets.

    shape: of the weight. moment: E[x xT], (n, n), or its diagonal (n,), over positions; of a grouped convolution over
    its groups as well. mean: E[x], (n,). Of an embedding (``counts``) the moment is how often each row was taken,
    (rows,), and there is no mean. sensitivity: per channel of the output, mean over positions of the squared derivative
    of the objective; of an embedding (width,). positions: behind moment and mean, each group of a convolution for
    itself. positions_per_sample: of the output, behind the sensitivity.

    With E = W - W' the expected squared change of the objective, per sample and to first order, is about
    ``positions_per_sample * sum_i s_i (E moment ET)_ii``.
    """

    shape: tuple[int, ...]
    moment: Tensor
    mean: Tensor | None
    sensitivity: Tensor
    positions: int
    positions_per_sample: float
    counts: bool = False

    @property
    def fan_in(self) -> int:
        """Inputs of the weight's matrix."""
        return math.prod(self.shape[1:])

    @property
    def diagonal(self) -> bool:
        """Whether of E[x xT] there is the diagonal alone."""
        return not self.counts and self.moment.ndim == 1

    @property
    def kind(self) -> LayerKind:
        """What the layer was used as."""
        if self.counts:
            return LayerKind.EMBEDDING
        return LayerKind.LINEAR if len(self.shape) == 2 else LayerKind.CONV


@dataclass(frozen=True)
class Statistics:
    """What the layers of a checkpoint meet on calibration data.

    source: SHA-256 of the checkpoint. sensitivity_of: ``loss``, or ``output`` for random signs times the output.
    batches: behind the moments. untraced: layer -> why nothing is known of it; spilled: layers whose moments were
    summed in temporary files; notes: these three belong to the run that measured, and no file has them. path: of the
    file that they were read from.
    """

    source: str
    sensitivity_of: str
    batches: int
    layers: Mapping[str, LayerStatistics]
    untraced: Mapping[str, str] = field(default_factory=dict)
    spilled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    path: Path | None = field(default=None, compare=False)


def write_statistics(
    statistics: Statistics, path: Path | str, *, force: bool = False, inputs: Iterable[Path] = ()
) -> None:
    """Write a file that is there completely or not at all. force: replace what is there. inputs: never to be replaced.

    Raises OutputError when it exists or cannot be written, NumericalError for values beyond float32.
    """
    with Output(Path(path), is_folder=False, force=force, inputs=inputs) as output:
        write_draft(statistics, output.draft)
        output.commit()


def write_draft(statistics: Statistics, path: Path) -> None:
    """Write the file under a name that is nobody's yet. Raises NumericalError for values beyond float32."""
    document = {
        "version": VERSION,
        "writer": f"tcompress {__version__}",
        "source": {"sha256": statistics.source},
        "sensitivity_of": statistics.sensitivity_of,
        "batches": statistics.batches,
        "layers": {name: _described(layer) for name, layer in statistics.layers.items()},
    }
    pieces = [
        Piece(f"{name}.{part}", _F32, tuple(tensor.shape), name, partial(_bytes, tensor, f"{name}.{part}"))
        for name, layer in statistics.layers.items()
        for part, tensor in _parts(layer)
    ]
    write_file(path, pieces, {METADATA_KEY: compact_json(document)}, None)


def read_statistics(path: Path | str) -> Statistics:
    """Return what ``write_statistics`` wrote, in float64.

    Raises InputError for any other file, or a value that cannot be, UnsupportedError for a newer version.
    """
    path = Path(path)
    with SafetensorsFile(path) as file:
        text = file.metadata.get(METADATA_KEY)
        if text is None:
            raise InputError(f"is no file of statistics; {_WAY_OUT}", path=path)
        document = parse_object(text.encode(), path)
        _require_version(document, path)
        match document:
            case {
                "source": {"sha256": str(source)},
                "sensitivity_of": "loss" | "output" as sensitivity_of,
                "batches": int(batches),
                "layers": dict(entries),
            }:
                pass
            case _:
                raise InputError("its statistics lack source, sensitivity_of, batches or layers", path=path)
        layers = {name: _layer(file, name, entry) for name, entry in entries.items()}
        known = {f"{name}.{part}" for name, layer in layers.items() for part, _ in _parts(layer)}
        for name in file:
            if name not in known:
                raise InputError("belongs to no layer of these statistics", path=path, tensor=name)
    return Statistics(source, sensitivity_of, batches, layers, path=path)


def _described(layer: LayerStatistics) -> dict[str, Any]:
    return {
        "shape": list(layer.shape),
        "diagonal": layer.diagonal,
        "counts": layer.counts,
        "positions": layer.positions,
        "positions_per_sample": layer.positions_per_sample,
    }


def _parts(layer: LayerStatistics) -> Iterator[tuple[str, Tensor]]:
    yield "moment", layer.moment
    if layer.mean is not None:
        yield "mean", layer.mean
    yield "sensitivity", layer.sensitivity


def _bytes(tensor: Tensor, name: str) -> memoryview:
    found = tensor.to(torch.float32)
    if not bool(torch.isfinite(found.abs().max())):
        raise NumericalError("has values that float32 cannot hold", tensor=name)
    return bytes_of(found)


def _require_version(document: Mapping[str, Any], path: Path) -> None:
    version = document.get("version")
    if type(version) is not int or version < 1:
        raise InputError("its statistics have no version", path=path)
    if version > VERSION:
        raise UnsupportedError(f"is of version {version}; this tcompress reads up to {VERSION}; {_WAY_OUT}", path=path)


def _layer(file: SafetensorsFile, name: str, entry: Any) -> LayerStatistics:
    match entry:
        case {
            "shape": [*sizes],
            "diagonal": bool(diagonal),
            "counts": bool(counts),
            "positions": int(positions),
            "positions_per_sample": float(per_sample),
        } if _is_shape(sizes) and positions >= 0 and per_sample >= 0 and not (diagonal and counts):
            pass
        case _:
            raise InputError("its entry in the statistics is damaged", path=file.path, tensor=name)
    rows, fan_in = sizes[0], math.prod(sizes[1:])
    moment_shape: tuple[int, ...] = (rows,) if counts else (fan_in,) if diagonal else (fan_in, fan_in)
    return LayerStatistics(
        shape=tuple(sizes),
        moment=_moment(file, f"{name}.moment", moment_shape),
        mean=None if counts else _values(file, f"{name}.mean", (fan_in,)),
        sensitivity=_not_negative(file, f"{name}.sensitivity", (sizes[1] if counts else rows,)),
        positions=positions,
        positions_per_sample=per_sample,
        counts=counts,
    )


def _is_shape(sizes: list[Any]) -> bool:
    return 2 <= len(sizes) <= 5 and all(type(size) is int and 1 <= size < 1 << 40 for size in sizes)


def _values(file: SafetensorsFile, name: str, shape: tuple[int, ...]) -> Tensor:
    info = file.infos.get(name)
    if info is None:
        raise InputError("is missing from the statistics", path=file.path, tensor=name)
    if info.shape != shape or info.dtype is not _F32:
        problem = f"is {info.dtype.name} of shape {info.shape}; float32 of shape {shape} was expected"
        raise InputError(problem, path=file.path, tensor=name)
    found = file.read(name).double()
    low, high = torch.aminmax(found)  # NaN comes through
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise InputError("holds NaN or Inf", path=file.path, tensor=name)
    return found


def _not_negative(file: SafetensorsFile, name: str, shape: tuple[int, ...]) -> Tensor:
    found = _values(file, name, shape)
    if bool((found < 0).any()):
        raise InputError("holds negative values", path=file.path, tensor=name)
    return found


def _moment(file: SafetensorsFile, name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return _not_negative(file, name, shape)
    found = _values(file, name, shape)
    if bool((found.diagonal() < 0).any()):
        raise InputError("has negative values on its diagonal", path=file.path, tensor=name)
    for start in range(0, len(found), _CHECKED):
        rows = slice(start, start + _CHECKED)
        if not torch.equal(found[rows], found[:, rows].T):
            raise InputError("is not symmetric", path=file.path, tensor=name)
    return found
