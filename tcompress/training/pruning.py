"""prune: the sparse parts start full, and lose their smallest values epoch after epoch until the plan's amount is left.

Algorithm 1 of the low-rank-plus-sparse paper. Letters: A = the dense weight as its matrix (out, fan_in); L, S = the
low-rank and the sparse part; M = the mask of what is kept of S; s_t = the fraction of all values of S that is pruned
at epoch t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from tcompress.errors import NumericalError, UsageError
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.linalg.magnitude import threshold_of
from tcompress.runtime.install import collect
from tcompress.runtime.learning import Learning, Pruned
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import Held, PackedFactorization, held_in
from tcompress.training.coded import through_codes
from tcompress.training.distillation import Distill, Distillation
from tcompress.training.objective import Objective, Setup
from tcompress.training.options import Defaults
from tcompress.workflow.plan import Plan, Target

SCHEDULES = ("cubic", "zhu-gupta")
_FORMATS = f"{Sparse.name} or {LowRankSparse.name}"


@dataclass(frozen=True)
class Prune(Distill):
    """Distil, and before each epoch prune all sparse parts together by one threshold on magnitudes.

    L is the plan's fit (equations 12 and 14). S is all that it leaves: A - L where it is added (equation 9), A itself
    where it stands in the place of L (equation 10; with A - L, which equation 14 prints, that would not give A). So the
    model begins as the dense one, and ends with as many values of S as the plan has, wherever they are largest.
    ``sparse`` has no L: the paper's pruning baseline. Layers in other formats learn from the plan's fit.

    schedule: s_t, with n the last epoch that prunes: ``cubic``, s_f (t/n)^3, the paper's equation 7; or ``zhu-gupta``,
    s_f (1 - (1 - t/n)^3), which prunes most in the beginning. until: n over the number of epochs; the others learn
    with the masks as they are. It is 1 in the paper. through_codes: as of ``finetune``, from the epoch on that prunes
    last: what is stored before that is no model that was asked for.
    """

    schedule: str = "cubic"
    until: float = 0.5

    name: ClassVar[str] = "prune"
    summary: ClassVar[str] = "distill, while all sparse parts are pruned together, from the dense model down to a plan"
    reference: ClassVar[str] = "Hawkins et al. 2021, algorithm 1; Zhu & Gupta 2017"
    defaults: ClassVar[Defaults] = Defaults(epochs=8, lr=1e-3)
    starts_dense: ClassVar[bool] = True
    by_epochs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in SCHEDULES:
            raise UsageError(f"--method prune: schedule is one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not 0 < self.until <= 1:
            raise UsageError(f"--method prune: until is a fraction of the epochs, above 0, to 1; got {self.until:g}")

    def check_plan(self, plan: Plan) -> None:
        if not any(_prunes(rule.format) for rule in plan.rules):
            raise UsageError(f"--method prune has nothing to prune: no layer of the plan is in {_FORMATS}")
        for rule in plan.rules:
            options = rule.format.options if isinstance(rule.format, Target) else {"m": getattr(rule.format, "m", None)}
            if _prunes(rule.format) and options.get("m") is not None:
                problem = "--method prune has one threshold for all layers, which makes no groups of m; leave m out"
                raise UsageError(f"{rule.match}: {problem}")

    def prepare(self, setup: Setup, dense: nn.Module | None) -> None:
        assert dense is not None, "it starts dense"  # noqa: S101
        found = {
            id(layer): (layer, dense.get_parameter(name))
            for name, layer in collect(setup.model).items()
            if isinstance(layer.setting, Sparse | LowRankSparse)
            if any(factor.requires_grad for factor in layer.factors.parameters())
        }
        if not found:
            raise UsageError(f"--method prune has nothing to prune: no layer that learns is in {_FORMATS}")
        _fill(list(found.values()))

    def objective(self, setup: Setup) -> Objective:
        assert setup.teacher is not None, "it has one"  # noqa: S101
        assert setup.epochs is not None, "it goes by epochs"  # noqa: S101
        return Pruning(self, setup, setup.teacher, setup.epochs)


class Pruning(Distillation):
    """Equation 8, on a model that is pruned between epochs. What is pruned stays so."""

    def __init__(self, method: Prune, setup: Setup, teacher: nn.Module, epochs: int) -> None:
        codes = through_codes(setup.model, asked=method.through_codes)
        super().__init__(method, setup.task, setup.model, teacher, codes)
        self._schedule = method.schedule
        self._parts = [module for module in setup.model.modules() if isinstance(module, Pruned)]
        self._values = sum(part.mask.numel() for part in self._parts)
        self._planned = sum(part.planned for part in self._parts)
        self._last = max(1, math.floor(method.until * epochs + 0.5))

    def begin_epoch(self, epoch: int, *, anew: bool) -> None:
        if anew:  # else the masks were saved with the model
            pruned = sparsity(epoch / self._last, self._values - self._planned, self._schedule)
            prune(self._parts, self._values - math.floor(pruned + 0.5))
        if self._codes is not None:
            self._codes.begin(anew=anew, waits=not self.may_be_written(epoch))

    def may_be_written(self, epoch: int) -> bool:
        return epoch >= self._last


def sparsity(passed: float, final: float, schedule: str) -> float:
    """Return s_t for a final s_f, or for a final count the count. passed: t/n, from 0; from 1 on it is s_f exactly.

    A fraction of all values: of those not yet masked, as the paper words it too, s_f would never be reached.
    """
    passed = min(1.0, passed)
    return final * (passed**3 if schedule == "cubic" else 1 - (1 - passed) ** 3)


def prune(parts: Sequence[Pruned], count: int) -> None:
    """Keep the ``count`` largest magnitudes of all that the masks of the parts keep, or all where they are no more.

    Of equal magnitudes those of earlier parts, and those that come first, are kept. Raises NumericalError for values
    that are not finite, which have no order.
    """
    kept = torch.cat([part.values.detach()[part.mask] for part in parts])
    if not bool(torch.isfinite(kept).all()):
        raise NumericalError("a sparse value is not finite; a smaller --lr may keep it so")
    if count >= len(kept):
        return
    threshold, ties = threshold_of(kept, count) if count > 0 else (math.inf, 0)
    for part in parts:
        magnitudes = part.values.detach().abs()
        equal = ((magnitudes == threshold) & part.mask).reshape(-1).nonzero()[:ties, 0]
        ties -= len(equal)
        part.mask.logical_and_(magnitudes > threshold).view(-1)[equal] = True


def _prunes(choice: object) -> bool:
    kind = choice.format if isinstance(choice, Target) else type(choice)
    return isinstance(kind, type) and issubclass(kind, Sparse | LowRankSparse)


def _fill(layers: Sequence[tuple[Factorized, Tensor]]) -> None:
    """Give layers all of S that their low-rank parts leave of their dense weights, to be pruned; L stays as it learns.

    Layers that share S share it still.
    """
    once: dict[int, Pruned] = {}
    all_held = [held_in(layer.factors) for layer, _ in layers]  # kept to the end, so that no identity is given twice
    for (layer, weight), held in zip(layers, all_held, strict=True):
        setting = layer.setting
        assert isinstance(setting, Sparse | LowRankSparse), "it was chosen for that"  # noqa: S101
        name = "matrix" if isinstance(setting, Sparse) else "sparse.matrix"
        was = held[name]
        assert isinstance(was, nn.Parameter | Learning), "it learns"  # noqa: S101
        if id(was) not in once:
            dtype, coding = (was.dtype, was.coding) if isinstance(was, Learning) else (was.dtype, None)
            with torch.no_grad():
                full = _full(setting, held, name, weight)
            once[id(was)] = Pruned(full, dtype, coding, planned=setting.kept(weight.numel()))
        layer.hold(PackedFactorization(setting, layer.factors.shape, {**held, name: once[id(was)]}))


def _full(setting: Sparse | LowRankSparse, held: dict[str, Held], name: str, weight: Tensor) -> Tensor:
    """Return S (out, fan_in) with which the layer's weight is the dense one; the factor ``name`` is to be it."""
    values = {each: (found if isinstance(found, nn.Parameter) else found()).float() for each, found in held.items()}
    low = setting.load(tuple(weight.shape), values | {name: torch.zeros_like(values[name])}).reconstruct()
    whole = weight.float()
    if setting.added_matrix is not None:
        return (whole - low).reshape(len(whole), -1)
    # A zero would say that L stands there.
    return torch.where(whole == 0, torch.finfo(torch.float32).tiny, whole).reshape(len(whole), -1)
