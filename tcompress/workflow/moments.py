"""What each layer of a model gets as input, over all calibration batches: one forward pass of each.

Letters: n = inputs of a weight's matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tcompress.checkpoint.reader import Checkpoint
from tcompress.checkpoint.statistics_file import LayerStatistics
from tcompress.errors import NumericalError, OutputError
from tcompress.formats.metric import Metric
from tcompress.linalg.second_moment import SecondMoment
from tcompress.workflow.sensitivity import Sensitivity
from tcompress.workflow.tracing import Traced, Use, input_matrix, rows_of

_LARGEST_FULL = 1 << 12  # inputs of a layer above which planning keeps the diagonal of its moment alone
_PATCH_VALUES = 1 << 25  # of a convolution's input at a time: patches are many times the input


def moment_bytes(use: Use, largest_full: int) -> int:
    """Return the bytes that a layer's moment takes while it is summed."""
    if isinstance(use.module, nn.Embedding):
        return 8 * use.layer.shape[0]
    n = _fan_in(use)
    return 8 * n * (n if n <= largest_full else 1)


def _fan_in(use: Use) -> int:
    return use.layer.values // use.layer.shape[0]


class Inputs:
    """What each layer gets as input, summed in float64.

    largest_full: n above which the diagonal of a moment is kept alone. spilled: layer -> folder for its moment.
    all_rows: of every batch, or as many as say what all do (``rows_of``).
    """

    def __init__(
        self,
        uses: Mapping[str, Sequence[Use]],
        checkpoint: Checkpoint,
        largest_full: int,
        spilled: Mapping[str, Path],
        *,
        all_rows: bool = True,
    ) -> None:
        self._uses, self._checkpoint, self._all_rows = uses, checkpoint, all_rows
        self._batch = 0
        self._counts: dict[str, Tensor] = {}
        self._moments: dict[str, SecondMoment] = {}
        for number, (name, all_) in enumerate(uses.items()):
            if isinstance(all_[0].module, nn.Embedding):
                self._counts[name] = torch.zeros(all_[0].layer.shape[0], dtype=torch.float64)
                continue
            n = _fan_in(all_[0])
            full = n <= largest_full
            folder = spilled.get(name)
            storage = None if folder is None else _mapped(folder / str(number), (n, n) if full else (n,))
            self._moments[name] = SecondMoment(n, full=full, storage=storage)

    def measure(
        self, traced: Traced, batches: Sequence[Any], starting: Callable[[int, str], None] = lambda *_: None
    ) -> None:
        """Run the model on all batches. starting: is told batch and layer whenever one is called.

        Raises NumericalError where a layer's input has NaN or Inf.
        """

        def watch(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
                starting(self._batch, name)
                self._add(name, module, (arguments or tuple(named.values()))[0].detach())

            return keep

        handles = [
            use.module.register_forward_pre_hook(watch(name), with_kwargs=True)
            for name, all_ in self._uses.items()
            for use in all_
        ]
        try:
            for number, batch in enumerate(batches, start=1):
                self._batch = number
                traced.run(batch)
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, module: nn.Module, x: Tensor) -> None:
        if not _fits(module, x):
            return  # the module itself says it better
        if name in self._counts:
            counts = self._counts[name]
            counts.add_(torch.bincount(x.flatten().long().cpu(), minlength=len(counts)))
            return
        if not bool(torch.isfinite(x).all()):
            raise NumericalError(
                f"its input is not finite on batch {self._batch} of calibration_batches",
                path=self._checkpoint.path,
                tensor=name,
            )
        for piece in _pieces(module, x) if self._all_rows else [x]:
            self._moments[name].add(input_matrix(module, piece) if self._all_rows else rows_of(module, piece))

    def counts(self, name: str) -> Tensor:
        """Return how often each row of a table was looked up, (rows,)."""
        return self._counts[name]

    def metric(self, name: str) -> Metric:
        """Return which errors of a layer count; once for each."""
        if name in self._counts:
            return metric_of_counts(self._counts[name])
        return Metric(self._moments[name].finish().second)

    def statistics(self, name: str, sensitivity: Sensitivity) -> LayerStatistics:
        """Return what was measured of a layer; once for each."""
        shape = self._uses[name][0].layer.shape
        rest = (sensitivity.values, sensitivity.positions_per_sample)
        if name in self._counts:
            counts = self._counts[name]
            return LayerStatistics(shape, counts, None, rest[0], int(counts.sum()), rest[1], counts=True)
        found = self._moments[name].finish()
        extremes = torch.stack(torch.aminmax(found.second)).float()  # as they will be stored
        if not bool(torch.isfinite(extremes).all()):
            raise NumericalError(
                "the squares of its inputs are beyond float32", path=self._checkpoint.path, tensor=name
            )
        return LayerStatistics(shape, found.second, found.mean, rest[0], found.count, rest[1])


def _fits(module: nn.Module, x: Tensor) -> bool:
    if isinstance(module, nn.Embedding):
        return x.numel() > 0 and bool((x >= 0).all()) and bool((x < module.num_embeddings).all())
    if isinstance(module, nn.Linear):
        return x.ndim > 0 and x.shape[-1] == module.in_features
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)  # noqa: S101
    sizes = len(module.kernel_size)
    return x.ndim in {sizes + 1, sizes + 2} and x.shape[-1 - sizes] == module.in_channels


def _pieces(module: nn.Module, x: Tensor) -> Sequence[Tensor]:
    """Return the input of a convolution a few samples at a time, of any other layer whole."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return [x]
    x = x if x.ndim == len(module.kernel_size) + 2 else x[None]
    values = x[:1].numel() * module.weight[0, 0].numel()
    return torch.split(x, max(1, _PATCH_VALUES // max(values, 1)))


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return zeros in a file. Written, not left out: a full disk is an error now, and no signal later."""
    try:
        with path.open("wb") as file:
            for _ in range(shape[0]):
                file.write(bytes(8 * (shape[1] if len(shape) == 2 else 1)))
    except OSError as error:
        raise OutputError(f"has no room for a moment ({error.strerror}); set TMPDIR", path=path.parent) from error
    return torch.from_numpy(np.memmap(path, dtype=np.float64, mode="r+", shape=shape))


def metrics_of(traced: Traced, batches: Sequence[Any], checkpoint: Checkpoint) -> dict[str, Metric]:
    """Return which errors of each traced layer count, from so many rows of every batch as say what all do.

    Of a weight that is used as an embedding and otherwise as well, the other uses count. Raises as ``Inputs.measure``.
    """
    uses: dict[str, list[Use]] = {}
    for use in traced.uses:
        uses.setdefault(use.layer.name, []).append(use)
    counted = {
        name: [use for use in all_ if not isinstance(use.module, nn.Embedding)] or all_ for name, all_ in uses.items()
    }
    inputs = Inputs(counted, checkpoint, _LARGEST_FULL, {}, all_rows=False)
    inputs.measure(traced, batches)
    return {name: inputs.metric(name) for name in counted}


def lookups_of(traced: Traced, batches: Sequence[Any], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return how often each row of a table is looked up, (rows,), by layers that are embeddings and nothing else."""
    uses: dict[str, list[Use]] = {}
    for use in traced.uses:
        uses.setdefault(use.layer.name, []).append(use)
    tables = {n: all_ for n, all_ in uses.items() if all(isinstance(use.module, nn.Embedding) for use in all_)}
    inputs = Inputs(tables, checkpoint, _LARGEST_FULL, {}, all_rows=False)
    inputs.measure(traced, batches if tables else ())
    return {name: inputs.counts(name) for name in tables}


def metric_of_counts(counts: Tensor) -> Metric:
    """Return which errors of an embedding count, of which the rows were looked up so often: (rows,).

    As if each had been looked up once more than it was: of what is rare nobody knows how rare it is.
    """
    return Metric(rows=counts + 1)
