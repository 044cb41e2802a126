"""What a layer becomes next where ranks come down step by step: by EVBMF of what it is now, weakened.

A dense layer is a matrix or a tensor of full ranks. A layer of factors is looked at by its core: with bases of
orthonormal columns the singular values are those of the whole weight, and the full ranks are those that it has.
EVBMF often finds nothing in such a core that stands out: the noise went with the first truncation, and what is left of
the spectrum is flat. Then the layer stays. Or all steps go towards the ranks that EVBMF gives the dense weight.

J. Gusak et al., "Automated multi-stage compression of neural networks" (MUSCO), 2019: the ranks, and cores compressed
again. S. Nakajima et al., 2013: EVBMF. Convolutions in groups and with dilation are as any other: a weight says nothing
of either, and the layer keeps them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError, UsageError
from tcompress.formats import Format
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker
from tcompress.linalg.again import inner_matrix, inner_tensor, lowered_matrix, lowered_tensor
from tcompress.linalg.evbmf import evbmf_rank, weakened_rank
from tcompress.linalg.svd import singular_values
from tcompress.workflow.checking import check_plan
from tcompress.workflow.decoding import CompressedView, view
from tcompress.workflow.fitting import Fitted, as_fitted, fit, working_copy
from tcompress.workflow.layout import planned_bytes
from tcompress.workflow.plan import Plan, Target
from tcompress.workflow.planning import find_clash, find_setting
from tcompress.workflow.settings import Settings


@dataclass(frozen=True)
class Goal:
    """A layer whose ranks may come down. least: the format, with the ranks that are the end of it."""

    layer: Layer
    least: SVD | Tucker
    store: torch.dtype


@dataclass(frozen=True)
class Step:
    """What a layer may become next. before: what it is, None where it is dense. saved: bytes, above 0."""

    goal: Goal
    before: Format | None
    setting: Format
    saved: int


def check_formats(plan: Plan) -> None:
    """Raise UsageError for a plan that asks for more than ranks of single layers, by ``svd`` and ``tucker``."""
    for rule in plan.rules:
        kind = rule.format.format if isinstance(rule.format, Target) else type(rule.format)
        if rule.format is not None and kind not in (SVD, Tucker):
            problem = f"ranks come down step by step in svd and tucker, and {rule.match} is to be {rule.format}"
            raise UsageError(f"{problem}; choose one of the two")


def goals_of(checkpoint: Checkpoint, plan: Plan, settings: Settings) -> list[Goal]:
    """Return the layers of a dense checkpoint that a plan speaks of; what it says of their size is the least.

    Raises as ``check_plan`` and ``check_formats``, and NumericalError where a size hangs on values that are not finite.
    """
    check_formats(plan)
    layers, found = find_layers(checkpoint), list[Goal]()
    check_plan(checkpoint, layers, plan, settings)
    for layer in layers:
        rule = plan.rule_for(layer.name)
        if rule is None or rule.format is None or find_clash(checkpoint, layer) is not None:
            continue
        own = settings.storing(rule.store)
        with_size = find_setting(partial(checkpoint.read, layer.name), layer, rule.format, own)
        if isinstance(with_size, SVD | Tucker):  # else nothing fits the size
            found.append(Goal(layer, with_size, own.stored_type(layer)))
    return found


class Ladder:
    """A checkpoint, dense or of factors that came down before, and the steps that lead further down.

    original: the dense checkpoint, by which errors are measured.
    """

    def __init__(self, checkpoint: Checkpoint, original: Checkpoint, settings: Settings) -> None:
        self.checkpoint, self._original, self._device = checkpoint, original, settings.device
        self._view: CompressedView | None = view(checkpoint) if is_compressed(checkpoint) else None

    def steps(self, goals: Sequence[Goal], weakening: float, *, towards_dense: bool = False) -> list[Step]:
        """Return the steps that save bytes, those that save most first, equal ones in the order of the file.

        weakening: how far they go from the ranks that there are to those of EVBMF, 1 being all the way.
        towards_dense: EVBMF of the original weights, not of the cores.
        """
        found = [step for goal in goals if (step := self._step(goal, weakening, towards_dense)) is not None]
        return sorted(found, key=lambda step: -step.saved)

    def fitted(self, step: Step) -> Fitted:
        """Return what a step makes of its layer. Raises as ``fit``."""
        goal, weight = step.goal, self._original.read(step.goal.layer.name)
        if step.before is None:
            trained = self.checkpoint.read(goal.layer.name)
            return fit(weight, step.setting, store=goal.store, device=self._device, target=trained)
        lowered = self._core(goal).lowered(step.setting)
        return as_fitted(weight, step.setting, lowered, store=goal.store, device=self._device)

    def _step(self, goal: Goal, weakening: float, towards_dense: bool) -> Step | None:
        try:
            core = self._core(goal)
            original = working_copy(self._original.read(goal.layer.name), self._device) if towards_dense else None
            setting = core.weakened(core if original is None else _core(goal, original), weakening)
        except NumericalError as error:
            raise NumericalError(error.reason, path=self.checkpoint.path, tensor=goal.layer.name) from error
        before, layer = self._before(goal.layer.name), goal.layer
        if before is None:
            saved = layer.dense_bytes - sum(planned_bytes(layer, setting, goal.store, None))
        else:
            saved = before.stored_bytes(layer.shape, goal.store) - setting.stored_bytes(layer.shape, goal.store)
        return Step(goal, before, setting, saved) if saved > 0 else None

    def _before(self, name: str) -> Format | None:
        return None if self._view is None or name not in self._view.manifest.layers else self._view.setting(name)

    def _core(self, goal: Goal) -> _Core:
        if self._before(goal.layer.name) is None:
            return _core(goal, working_copy(self.checkpoint.read(goal.layer.name), self._device))
        assert self._view is not None, "it has factors"  # noqa: S101
        factors = self._view.factors(goal.layer.name)
        return _core(goal, None, {name: values.to(self._device) for name, values in factors})


class _Core(ABC):
    """What has the singular values of a layer, whole or without the bases around it."""

    def __init__(self, goal: Goal, weight: Tensor | None, factors: Mapping[str, Tensor]) -> None:
        self.shape, self.goal, self.weight, self.factors = goal.layer.shape, goal, weight, factors

    @abstractmethod
    def unfoldings(self) -> list[Tensor]:
        """Return a matrix for each rank; its rows, of a product its smaller size, are as many as the rank can be."""

    @abstractmethod
    def weakened(self, of: _Core, weakening: float) -> Format:
        """Return the setting of the ranks that EVBMF leaves of another core of the layer, or of this one, weakened.

        None of its ranks is larger than it is now.
        """

    @abstractmethod
    def lowered(self, setting: Format) -> dict[str, Tensor]:
        """Return the factors of a setting of no larger ranks: bases times what the core becomes."""

    def _ranks(self, of: _Core, weakening: float, least: Sequence[int], full: Sequence[int]) -> list[int]:
        found = [evbmf_rank(singular_values(each), *each.shape) for each in of.unfoldings()]
        each = zip(full, found, least, strict=True)
        return [weakened_rank(most, min(most, rank), weakening, end) for most, rank, end in each]


class _MatrixCore(_Core):
    """Of ``svd``: R_left R_right^T of the QR decompositions of both factors, (r, r)."""

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return inner_matrix(self.factors["left"], self.factors["right"])

    def unfoldings(self) -> list[Tensor]:
        assert isinstance(self.goal.least, SVD)  # noqa: S101
        return [self._parts[1] if self.weight is None else self.goal.least.matrix(self.weight)]

    def weakened(self, of: _Core, weakening: float) -> Format:
        assert isinstance(self.goal.least, SVD)  # noqa: S101
        full = [min(each.shape) for each in self.unfoldings()]
        return replace(self.goal.least, rank=self._ranks(of, weakening, [self.goal.least.rank], full)[0])

    def lowered(self, setting: Format) -> dict[str, Tensor]:
        assert isinstance(setting, SVD)  # noqa: S101
        left, right = lowered_matrix(self._parts, setting.rank)
        return {"left": left, "right": right}


class _TensorCore(_Core):
    """Of ``tucker``: the core, once the factors around it are orthonormal, (r1, ..., rd, kernel)."""

    @cached_property
    def _parts(self) -> tuple[Tensor, list[Tensor | None]]:
        core = self.factors["core"]
        return inner_tensor(core, [*(self.factors[f"factors.{mode}"] for mode in range(core.ndim - 1)), None])

    def unfoldings(self) -> list[Tensor]:
        assert isinstance(self.goal.least, Tucker)  # noqa: S101
        folding = self.goal.least.folding(self.shape)
        return Tucker.unfoldings(self._parts[0] if self.weight is None else folding.fold(self.weight))

    def weakened(self, of: _Core, weakening: float) -> Format:
        assert isinstance(self.goal.least, Tucker)  # noqa: S101
        folding = self.goal.least.folding(self.shape)
        full = [each.shape[0] for each in self.unfoldings()]
        ranks = self._ranks(of, weakening, self.goal.least.clipped(folding), full)
        return replace(self.goal.least, rank=None, ranks=Tucker.reduced(folding, tuple(ranks)))

    def lowered(self, setting: Format) -> dict[str, Tensor]:
        assert isinstance(setting, Tucker)  # noqa: S101
        core, *factors = lowered_tensor(*self._parts, [*setting.clipped(setting.folding(self.shape)), None])
        return {"core": core, **{f"factors.{mode}": factor for mode, factor in enumerate(factors)}}


def _core(goal: Goal, weight: Tensor | None, factors: Mapping[str, Tensor] | None = None) -> _Core:
    """Return the core of a dense weight, or of factors."""
    kind = _MatrixCore if isinstance(goal.least, SVD) else _TensorCore
    return kind(goal, weight, factors or {})
