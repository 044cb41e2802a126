"""verify(): is a compressed checkpoint what it says it is, byte by byte and error by error?"""

from __future__ import annotations

import math
import stat
import time
from collections.abc import Iterator

import torch

from tcompress.checkpoint.integrity import damage, sha256_of_files
from tcompress.checkpoint.layers import Layer
from tcompress.checkpoint.manifest import SIDECAR, parse_manifest
from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.safetensors_file import MAX_HEADER_BYTES, SafetensorsFile
from tcompress.checkpoint.sharded import ShardedCheckpoint
from tcompress.errors import TcompressError
from tcompress.linalg.distance import compare, frobenius_norm
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.results import VerificationResult, VerifiedLayer

# Another machine or number of threads sums in another order: float32 products differ in the last digits.
_ABSOLUTE = 2e-6
_RELATIVE = 1e-4


def verify(
    checkpoint: Checkpoint,
    *,
    against: Checkpoint | None = None,
    device: torch.device | None = None,
    progress: Progress = silent,
) -> VerificationResult:
    """Check every byte against its hash, the manifest against the tensors, and the reported errors.

    against: the checkpoint it was made from. With it every relative error is computed again from what lies on disk and
    every tensor that is neither compressed nor said to be repaired is compared; without it, an error is held against
    the norms of the weight, as reported, and of its reconstruction, which it cannot be smaller than the difference of.

    Raises InputError when the file is so damaged that it cannot be read as a compressed checkpoint.
    """
    started = time.perf_counter()
    device = device or torch.device("cpu")
    problems = [
        problem for shard in checkpoint.shards if isinstance(shard, SafetensorsFile) for problem in damage(shard)
    ]
    dense = view(checkpoint)
    problems += _document_problems(dense)
    original, strange = _comparable(dense, against)
    problems += strange
    layers = []
    entries = [Layer(name, entry.kind, entry.shape, entry.dtype) for name, entry in dense.manifest.layers.items()]
    for layer in steps("verifying", entries, progress):
        try:
            layers.append(_layer(dense, layer, original, device))
        except TcompressError as error:
            problems.append(str(error))
    problems += [f"{checkpoint.path}: tensor {each.name}: {text}" for each in layers for text in each.problems]
    if original is not None:
        problems += _differences(dense, original)
    problems += _repair_problems(dense)
    seconds = time.perf_counter() - started
    return VerificationResult(
        checkpoint.path, tuple(layers), tuple(problems), against is not None, seconds, dense.manifest.repaired
    )


def _comparable(dense: CompressedView, against: Checkpoint | None) -> tuple[Checkpoint | None, list[str]]:
    """Return what can be compared tensor by tensor, None where all of it would differ, and what is wrong with it."""
    if against is None or dense.manifest.source.get("sha256") == sha256_of_files(against.files):
        return against, []
    made = dense.checkpoint.path
    problem = f"{against.path}: is not the checkpoint that {made} was made from: its SHA-256 is another"
    if any(_is_same(dense, against, name) for name in dense.infos):
        return against, [problem]
    return None, [f"{problem}, and no tensor is the same; it is another model, or was trained anew"]


def _is_same(dense: CompressedView, against: Checkpoint, name: str) -> bool:
    """Tell whether a tensor shows that two checkpoints are akin: a compressed layer by its norm, others by their bytes.

    Those of one value show nothing: biases that are all zero, and counts of batches, are alike in any two models.
    """
    info, other = dense.infos[name], against.get(name)
    if other is None or (info.shape, info.dtype) != (other.shape, other.dtype):
        return False
    if name in dense.manifest.layers:
        norm = dense.manifest.layers[name].norm
        return norm > 0 and math.isclose(frobenius_norm(against.read(name)), norm, rel_tol=_RELATIVE)
    if name not in dense.checkpoint:  # tied to another, which is looked at
        return False
    data, size = against.raw(name), max(1, info.dtype.itemsize)
    is_one_value = data[size:] == data[:-size]
    return not is_one_value and data == dense.checkpoint.raw(name)


def _layer(dense: CompressedView, layer: Layer, against: Checkpoint | None, device: torch.device) -> VerifiedLayer:
    entry = dense.manifest.layers[layer.name]
    rebuilt = dense.read(layer.name, device)
    problems = list(_contradictions(dense, layer))
    if not bool(torch.isfinite(rebuilt).all()):
        problems.append("its factors give NaN or Inf")
        return VerifiedLayer(layer.name, entry.relative_error, None, tuple(problems))
    rebuilt_norm, _ = compare(rebuilt, rebuilt)
    gap = abs(rebuilt_norm - entry.norm)
    reported = entry.relative_error
    if reported is not None and gap > (reported + _ABSOLUTE) * (1 + _RELATIVE) * entry.norm:
        problems.append(
            f"reports an error of {reported:g}, but the norms {entry.norm:g} and {rebuilt_norm:g} "
            f"of the weight and of what is stored are further apart"
        )
    measured = None
    if against is not None and layer.name in against and against[layer.name].shape == layer.shape:
        norm, measured = compare(against.read(layer.name), rebuilt)
        if reported is not None and not math.isclose(measured, reported, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE):
            problems.append(f"reports an error of {reported:g}, measured is {measured:g}")
        if not math.isclose(norm, entry.norm, rel_tol=_RELATIVE):
            problems.append(f"reports a norm of {entry.norm:g}, measured is {norm:g}")
    return VerifiedLayer(layer.name, reported, measured, tuple(problems))


def _contradictions(dense: CompressedView, layer: Layer) -> Iterator[str]:
    """Compare what the options announce with the factors that are there."""
    setting = dense.setting(layer.name)
    factors = dict(dense.factors(layer.name))
    for name, spec in dense.announced(layer.name, next(iter(factors.values())).dtype).items():
        there = tuple(factors[name].shape) if name in factors else None
        if there != spec.shape:
            yield f"{setting} announces a factor {name} of shape {spec.shape}, stored is {there}"


def _document_problems(dense: CompressedView) -> Iterator[str]:
    """The manifest beside sharded files must say what the shards say, and the index must know their size."""
    checkpoint = dense.checkpoint
    if not isinstance(checkpoint, ShardedCheckpoint):
        return
    total = sum(info.nbytes for info in checkpoint.values())
    if checkpoint.index_metadata.get("total_size") != total:
        yield f"{checkpoint.index}: its total_size is not the {total} bytes of the tensors"
    sidecar = checkpoint.index.parent / SIDECAR
    try:
        status = sidecar.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_HEADER_BYTES:
            yield f"{sidecar}: is not a regular file, or larger than a manifest can be"
            return
        same = parse_manifest(sidecar.read_text("utf-8").rstrip(), sidecar) == dense.manifest
    except (OSError, UnicodeDecodeError) as error:
        yield f"{sidecar}: cannot be read ({error})"
        return
    except TcompressError as error:
        yield str(error)
        return
    if not same:
        yield f"{sidecar}: does not say what the shards say"


def _repair_problems(dense: CompressedView) -> Iterator[str]:
    """A repaired tensor is there under its own name, and has finite values of a floating type."""
    path = dense.checkpoint.path
    for name in dense.manifest.repaired:
        if name not in dense.infos or name not in dense.checkpoint:
            yield f"{path}: tensor {name}: is said to be repaired, and is not there"
        elif not dense.infos[name].dtype.is_floating:
            yield f"{path}: tensor {name}: is said to be repaired, and is {dense.infos[name].dtype.name}"
        elif not bool(torch.isfinite(dense.checkpoint.read(name)).all()):
            yield f"{path}: tensor {name}: is repaired, and has NaN or Inf"


def _differences(dense: CompressedView, against: Checkpoint) -> Iterator[str]:
    """Compare names, shapes, types, ties and untouched tensors with the checkpoint that it was made from."""
    path = dense.checkpoint.path
    for name in sorted(set(against) ^ set(dense.infos)):
        yield f"{path}: tensor {name}: is only in {against.path if name in against else path}"
    for name in dense.infos:
        if name not in against:
            continue
        info, other = dense.infos[name], against[name]
        if (info.shape, info.dtype) != (other.shape, other.dtype):
            yield f"{path}: tensor {name}: is {info.dtype.name} {info.shape}, was {other.dtype.name} {other.shape}"
        elif name in dense.manifest.repaired:
            continue
        elif name in dense.checkpoint and dense.checkpoint.raw(name) != against.raw(name):
            yield f"{path}: tensor {name}: is not compressed, and yet differs from the original"
