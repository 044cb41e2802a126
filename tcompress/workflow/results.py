"""What a run found out, as plain data: the report is made from it."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tcompress.checkpoint.integrity import sha256_of_files
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import SIDECAR
from tcompress.checkpoint.reader import Checkpoint
from tcompress.formats import Format


@dataclass(frozen=True)
class Stored:
    """Files as they lie on disk: the bytes of the weights with their index and manifest, measured.

    files, sha256: of the weights alone, as ``sha256_of_files`` defines it for several.
    """

    path: Path
    files: tuple[str, ...]
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer. format None: it is dense, for ``reason``. notes: what else to know, as a clipped rank.

    exact_bytes: False where stored_bytes are a bound. store: the type of the factors. output_error: how far the layer's
    output, behind the layers that were compressed before it, is from the dense model's on the calibration inputs; None
    where it was not looked at.
    """

    layer: Layer
    format: Format | None
    stored_bytes: int
    relative_error: float | None
    seconds: float
    reason: str | None = None
    notes: tuple[str, ...] = ()
    exact_bytes: bool = True
    output_error: float | None = None
    store: torch.dtype | None = None


@dataclass(frozen=True)
class Repairs:
    """What was repaired once all layers were compressed. names: of the tensors that have other values than before.

    modules: how many could have been. held_out: samples that repairs were judged by. before, after: the distance of the
    compressed model's outputs from the dense model's on these, over the size of the latter; None where no repair could
    be judged, or it was not finite.
    """

    names: tuple[str, ...]
    modules: int
    held_out: int
    before: float | None
    after: float | None


@dataclass(frozen=True)
class CompressionResult:
    """One run of ``compress``; ``output`` is None after a dry run. repairs: None where none were asked for."""

    source: Stored
    output: Stored | None
    plan: Mapping[str, Any]
    layers: tuple[LayerResult, ...]
    stored_bytes: int
    seconds: float
    other_values: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    repairs: Repairs | None = None
    may_be_repaired: bool = False

    @property
    def compression_ratio(self) -> float:
        """Source bytes over output bytes: above 1 is better."""
        return self.source.nbytes / self.stored_bytes

    @property
    def exact_bytes(self) -> bool:
        """Whether stored_bytes are exact; those of a dry run may be a bound, where the fit decides what is stored."""
        return self.output is not None or (all(row.exact_bytes for row in self.layers) and not self.may_be_repaired)

    @property
    def largest_error(self) -> float:
        """The largest relative error of any layer."""
        return max((result.relative_error or 0.0 for result in self.layers), default=0.0)


@dataclass(frozen=True)
class DecompressionResult:
    """One run of ``decompress``: how many tensors were written, and how many of them rebuilt from factors."""

    source: Stored
    output: Stored
    tensors: int
    rebuilt: int
    seconds: float


@dataclass(frozen=True)
class VerifiedLayer:
    """One compressed layer; ``measured_error`` is None when there was nothing to measure against."""

    name: str
    reported_error: float | None
    measured_error: float | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class VerificationResult:
    """One run of ``verify``: every problem found, in sentences that name file and tensor.

    repaired: tensors that are not compressed, and are said to differ from the original.
    """

    path: Path
    layers: tuple[VerifiedLayer, ...]
    problems: tuple[str, ...]
    against: bool
    seconds: float
    repaired: tuple[str, ...] = ()


@dataclass(frozen=True)
class InspectionRow:
    """One tensor as its user knows it; ``setting`` and ``store`` are None when it is stored as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    dense_bytes: int
    stored_bytes: int
    kind: str | None
    setting: Format | None
    store: torch.dtype | None
    relative_error: float | None
    tied_to: str | None

    @property
    def format(self) -> str | None:
        """The setting as the command line takes it."""
        return None if self.setting is None else str(self.setting)


@dataclass(frozen=True)
class Inspection:
    """What the headers say. manifest: writer, source and ties of a compressed checkpoint, else None."""

    path: Path
    files: tuple[str, ...]
    file_bytes: int
    rows: tuple[InspectionRow, ...]
    metadata: Mapping[str, str]
    manifest: Mapping[str, Any] | None
    key: str | None
    other_values: tuple[str, ...]


@dataclass(frozen=True)
class AnalysisRow:
    """One layer at one setting. format None: the setting could not be fitted, for the reason in ``verdict``.

    structure: the error that the setting has on the same entries in random order, minus its error; near zero the layer
    has nothing that this format could use. None where it was not asked for, or means nothing.
    """

    layer: Layer
    asked: str
    format: Format | None
    stored_bytes: int | None
    relative_error: float | None
    seconds: float
    verdict: str
    worthwhile: bool
    structure: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Winner:
    """The setting with the smallest stored error of all that fit ``keep`` of a layer's bytes, and its family."""

    layer: Layer
    keep: float
    family: str
    row: AnalysisRow


@dataclass(frozen=True)
class Analysis:
    """One run of ``analyze``: rows by layer and asked setting, and each format's break-even setting by layer.

    best: for each layer and fraction of bytes at which several families of formats were tried and one fits.
    """

    source: Path
    asked: tuple[str, ...]
    rows: tuple[AnalysisRow, ...]
    break_even: Mapping[str, Mapping[str, Format | None]]
    seconds: float
    notes: tuple[str, ...] = field(default=())
    best: tuple[Winner, ...] = ()

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers looked at, in the order of the file."""
        return tuple(dict.fromkeys(row.layer for row in self.rows))


def describe(checkpoint: Checkpoint) -> Stored:
    """Measure and hash the files of an open checkpoint."""
    folder = checkpoint.folder
    return _stored(checkpoint.path, checkpoint.files, folder if checkpoint.sharded else None)


def measure(path: Path, is_folder: bool) -> Stored:
    """Measure and hash what was written, a file or the weights in a folder."""
    if not is_folder:
        return _stored(path, (path,), None)
    return _stored(path, tuple(sorted(path.glob("*.safetensors"))), path)


def _stored(path: Path, weights: tuple[Path, ...], folder: Path | None) -> Stored:
    documents = [] if folder is None else [*folder.glob("*.index.json"), *folder.glob(SIDECAR)]
    nbytes = sum(file.stat().st_size for file in [*weights, *documents])
    return Stored(path, tuple(file.name for file in weights), nbytes, sha256_of_files(weights))


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: under Linux its figure begins with the parent's, which may be much larger than we ever become.
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
