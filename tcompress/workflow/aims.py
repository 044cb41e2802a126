"""What a layer is to become behind the layers that are compressed before it, as a fit of its weight.

Letters: W (out, n) = the layer's weight as its matrix; X0, X (n, positions) = its inputs in the dense model and in the
one that is compressed so far; G = X XT and C = X0 XT, (n, n), both over the number of positions; D (out, positions) =
what is to be added to the output, because what it is added to is off (``shortcuts``), or nothing.

||W X0 + D - W' X||² is, but for a constant, ||(T - W') G^(1/2)||² with T = (W C + D XT) G^-1: the problem of a layer
alone, with another weight. So every format that can minimise the error of a layer's output can do this. G is damped by
a part of its mean diagonal, and T with it: where the inputs say nothing, W' stays near W.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tcompress.formats.metric import Metric
from tcompress.workflow.moments import metric_of_counts

_DAMPING = 0.01  # of the mean diagonal of G


@dataclass(frozen=True)
class Aim(ABC):
    """What a layer is to become: near ``target``, of the weight's shape, in the metric."""

    target: Tensor
    metric: Metric

    @abstractmethod
    def output_error(self, weight: Tensor) -> float:
        """Return how far the layer's output is from the wanted one over the calibration inputs, relative."""


@dataclass(frozen=True)
class OutputAim(Aim):
    """cross: W C + D XT, (out, n); power: mean ||W x0 + d||² of a position; undamped: G as it was measured."""

    cross: Tensor
    undamped: Tensor
    power: float

    def output_error(self, weight: Tensor) -> float:
        matrix = weight.reshape(self.cross.shape).double()
        square = self.power - 2 * float((matrix * self.cross).sum()) + float((matrix @ self.undamped * matrix).sum())
        return (max(square, 0.0) / self.power) ** 0.5 if self.power else 0.0


@dataclass(frozen=True)
class LookupAim(Aim):
    """Of an embedding. counts: (rows,), how often each row is looked up."""

    counts: Tensor

    @classmethod
    def of(cls, weight: Tensor, counts: Tensor) -> LookupAim:
        """Return the aim for a weight (rows, width)."""
        return cls(weight, metric_of_counts(counts), counts)

    def output_error(self, weight: Tensor) -> float:
        counted, wide = Metric(rows=self.counts), self.target.double()
        whole = counted.square(wide)
        return float((counted.square(wide - weight.to(wide)) / whole) ** 0.5) if whole else 0.0


class Products:
    """Sums over positions, in float64: XT X, X0T X, X0T X0, and with D also D X, D X0 and its squared size."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._count = 0

    def add(self, was: Tensor, now: Tensor, d: Tensor | None = None) -> None:
        """was, now: (positions, n), in the dense model and behind the prefix. d: (positions, out)."""
        products = [now.T @ now, was.T @ now, was.T @ was]
        if d is not None:
            products += [d.T @ now, d.T @ was, d.square().sum(dtype=torch.float64)]
        wide = [product.double() for product in products]
        self._sums = wide if not self._sums else [a.add_(b) for a, b in zip(self._sums, wide, strict=True)]
        self._count += len(now)

    @property
    def are_finite(self) -> bool:
        """Whether nothing among the inputs was NaN or infinite."""
        return all(bool(torch.isfinite(each).all()) for each in self._sums)

    def aim(self, weight: Tensor) -> OutputAim:
        """Return the aim for a layer's weight, of any floating type."""
        gram, crossed, dense, *shift = (each / self._count for each in self._sums)
        matrix = weight.reshape(len(weight), -1).double().to(gram.device)
        cross, power = matrix @ crossed, float((matrix @ dense * matrix).sum())
        if shift:
            now, was, size = shift
            cross, power = cross + now, power + 2 * float((matrix * was).sum()) + float(size)
        # Without any input nothing is better than the weight itself.
        damping = _DAMPING * float(gram.diagonal().mean()) or 1.0
        damped = gram + damping * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        target = torch.cholesky_solve((cross + damping * matrix).T, torch.linalg.cholesky(damped)).T
        working = torch.float64 if weight.dtype == torch.float64 else torch.float32
        shaped = target.to(working).reshape(weight.shape)
        return OutputAim(shaped, Metric(damped.to(working)), cross, gram, max(power, 0.0))
