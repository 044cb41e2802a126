"""lc: the dense weights learn, drawn ever closer to what they compress to, which is fitted anew again and again.

The Learning-Compression algorithm of Carreira-Perpinan & Idelbayev. Letters: w = a layer's dense weight; Theta = its
factors; Delta(Theta) = the weight that they give, as they would be stored; mu = the penalty; lambda = the multipliers;
L = the task's loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcompress.errors import UsageError
from tcompress.formats import Format
from tcompress.formats.base import matrix_of
from tcompress.formats.grouped import GroupFormat
from tcompress.formats.sparse import Sparse
from tcompress.linalg.magnitude import keep_largest
from tcompress.runtime.install import collect
from tcompress.runtime.learning import Learning
from tcompress.runtime.packed import Held, Maker, held_in
from tcompress.training.factors import as_stored
from tcompress.training.losses import require_gradient, untouched
from tcompress.training.objective import Method as Base
from tcompress.training.objective import Objective, Setup
from tcompress.training.options import Defaults
from tcompress.training.projection import project
from tcompress.training.twin import Twin
from tcompress.workflow.plan import Plan, Target

_GROWTH = 1000.0  # of the penalty, from the first L step to the last
_FEWEST_STEPS = 10  # of the optimizer in an L step: with fewer it is not made of what it is to be
_LEAST = 0.01  # of the loss: what compression costs at least, where the penalty is measured by it


@dataclass(frozen=True)
class LearningCompression(Base):
    """min L(w) so that w = Delta(Theta), by the augmented Lagrangian; Theta is of any format of single layers.

    L step: min over w of L(w) + mu/2 ||w - Delta(Theta) - lambda/mu||^2, by steps of the optimizer. C step: Theta = the
    format's fit of w - lambda/mu, or of factors stored as codes what ``project`` finds. Then lambda <- lambda - mu (w -
    Delta(Theta)) and mu <- growth * mu. It begins with Theta = the plan's fit of the dense weights, which is mu = 0:
    direct compression. Theta is fitted once more at the end of an epoch, for the scores.

    rounds: L and C steps in an epoch, or as many as leave ten steps of the optimizer to each L step; 0.5 is one in two
    epochs. mu: the first one. None: that at which the penalty of the start weighs as much as what direct compression
    adds to the loss, mu/2 ||w - Delta||^2 = L(Delta) - L(w), measured on the first batches. growth: None lets mu become
    1000 times the first. multipliers: False leaves lambda at 0, the quadratic penalty.

    alpha: the price of a value of the factors, in units of the loss: in formats that have a price the C step then
    chooses ranks as well, min over Theta of alpha * values + mu/2 ||w - lambda/mu - Delta(Theta)||^2, until that part
    of the epochs has passed; the other epochs keep them, and may be written. one_threshold: all ``sparse`` layers
    are pruned by one threshold on magnitudes, to as many values as the plan gives them together.
    """

    mu: float | None = None
    growth: float | None = None
    rounds: float = 10.0
    multipliers: bool = True
    alpha: float | None = None
    until: float = 0.5
    one_threshold: bool = False

    name: ClassVar[str] = "lc"
    summary: ClassVar[str] = "the dense weights learn, drawn ever closer to what they compress to"
    reference: ClassVar[str] = "Carreira-Perpinan & Idelbayev 2017, 2018; Idelbayev & Carreira-Perpinan 2020, 2021"
    defaults: ClassVar[Defaults] = Defaults(epochs=8, lr=5e-3)
    starts_dense: ClassVar[bool] = True
    by_epochs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, least in (("mu", 0.0), ("growth", 1.0), ("alpha", 0.0)):
            value = getattr(self, option)
            if value is None:
                continue
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not (least < value < math.inf or value == 1 == least):
                bound = "a number of at least 1" if least else "a number above 0"
                raise UsageError(f"--method lc: {option} is {bound}, got {value!r}")
        if not 0 < self.rounds < math.inf:
            raise UsageError(f"--method lc: rounds is a number of steps in an epoch, above 0; got {self.rounds:g}")
        if not 0 < self.until <= 1:
            raise UsageError(f"--method lc: until is a fraction of the epochs, above 0, to 1; got {self.until:g}")

    def check_plan(self, plan: Plan) -> None:
        kinds = [_kind(rule.format) for rule in plan.rules]
        for rule, kind in zip(plan.rules, kinds, strict=True):
            if kind is not None and issubclass(kind, GroupFormat):
                problem = f"--method lc fits each layer for itself, which {kind.name} does not; take another format"
                raise UsageError(f"{rule.match}: {problem}")
        if self.alpha is not None and not any(kind is not None and kind.has_price for kind in kinds):
            raise UsageError("--method lc: alpha is the price of ranks: no layer of the plan is in svd or reshaped-sum")
        if self.one_threshold and not any(_shares_threshold(rule.format) for rule in plan.rules):
            raise UsageError("--method lc: one_threshold is for sparse without m: no layer of the plan is in that")

    def prepare(self, setup: Setup, dense: nn.Module | None) -> None:
        assert dense is not None, "it starts dense"  # noqa: S101
        twins: dict[tuple[int, ...], Twin] = {}
        all_held: list[Sequence[Held]] = []  # kept to the end, so that no identity is given twice
        for name, layer in collect(setup.model).items():
            if isinstance(layer.factors, Twin) or not any(each.requires_grad for each in layer.factors.parameters()):
                continue
            held = held_in(layer.factors)
            all_held.append(list(held.values()))
            key = tuple(map(id, held.values()))  # layers that share their factors share what learns
            if key not in twins:
                twins[key] = self._twin(layer.setting, held, dense.get_parameter(name))
            layer.hold(twins[key])

    def _twin(self, setting: Format, held: dict[str, Held], weight: nn.Parameter) -> Twin:
        with torch.no_grad():
            values = {name: (each() if isinstance(each, Maker) else each).to(weight) for name, each in held.items()}
        first = next(iter(held.values()))
        assert isinstance(first, Learning | nn.Parameter), "it learns"  # noqa: S101
        is_free = setting.has_price if self.alpha is not None else self.one_threshold and _shares_threshold(setting)
        return Twin(weight, setting, setting.load(tuple(weight.shape), values), first.dtype, is_free=is_free)

    def objective(self, setup: Setup) -> Objective:
        assert setup.epochs is not None, "it goes by epochs"  # noqa: S101
        return Alternation(self, setup, setup.epochs)


class Alternation(Objective):
    """L steps as a loss; C steps between the optimizer's steps, and at the end of an epoch."""

    def __init__(self, method: LearningCompression, setup: Setup, epochs: int) -> None:
        self._method, self._task = method, setup.task
        self.twins = [module for module in setup.model.modules() if isinstance(module, Twin)]
        self._rounds = max(1, math.floor(method.rounds * epochs + 0.5))
        self._first = method.mu if method.mu is not None else self._balance(setup)
        self._last_choice = max(1, math.floor(method.until * epochs + 0.5))
        self._is_choosing = True
        self._is_touched = False  # by the task's loss, as far as that was looked at
        self._mu = self._first
        self._anchors: list[Tensor] = []  # Delta(Theta) + lambda/mu; none where they are to be made anew

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        pairs = zip(self.twins, self._anchors, strict=True)
        distances = [(twin.weight - anchor).square().sum() for twin, anchor in pairs]
        own = self._task.loss(model, batch)
        if not self._is_touched:
            self._require_touched(own)
        return own + self._mu / 2 * torch.stack(distances).sum()

    def _require_touched(self, own: Tensor) -> None:
        """Raise TaskError for a loss that does not touch the weights: the engine sees the penalty's gradient alone."""
        require_gradient(own, self._task)
        weights = [twin.weight for twin in self.twins]
        if all(each is None for each in torch.autograd.grad(own, weights, retain_graph=True, allow_unused=True)):
            raise untouched(self._task)
        self._is_touched = True

    def begin_epoch(self, epoch: int, *, anew: bool) -> None:
        del anew  # all that is not in the model follows from where the run is
        self._is_choosing = epoch <= self._last_choice

    @torch.no_grad()
    def begin_step(self, step: int, steps: int) -> None:
        rounds = max(1, min(self._rounds, steps // _FEWEST_STEPS))
        now, before = (each * rounds // steps for each in (step, max(0, step - 1)))
        if now != before:
            mu = self.penalty(before, rounds)
            self._compress(mu)
            if self._method.multipliers:
                for twin in self.twins:
                    twin.multiplier -= mu * (twin.weight - twin.compressed())
        self._mu = self.penalty(now, rounds)
        if not self._anchors:
            self._anchors = [twin.compressed() + twin.multiplier / self._mu for twin in self.twins]

    def end_epoch(self, epoch: int) -> None:
        del epoch
        self._compress(self._mu)

    def penalty(self, k: int, rounds: int) -> float:
        """Return mu of the L step k, the first being 0, of so many, and of the C step after it."""
        growth = self._method.growth
        if growth is None:
            growth = _GROWTH ** (1 / max(1, rounds - 1))
        return self._first * growth**k

    def may_be_written(self, epoch: int) -> bool:
        return self._method.alpha is None or epoch >= self._last_choice

    @torch.no_grad()
    def _compress(self, mu: float) -> None:
        """The C step: give every weight the factors that fit it best, beside its multipliers."""
        self._anchors = []
        alpha, together = self._method.alpha, list[tuple[Twin, Tensor]]()
        for twin in self.twins:
            target = twin.weight - twin.multiplier / mu
            if self._method.one_threshold and _shares_threshold(twin.planned):
                together.append((twin, target))
            elif alpha is not None and twin.planned.has_price and self._is_choosing:
                twin.take(twin.planned.fit_at_price(target, 2 * alpha / mu))
            else:
                project(twin, target)
        if together:
            _prune_together(together)

    def _balance(self, setup: Setup) -> float:
        """Return the mu at which the penalty of the start is what direct compression adds to the loss.

        To two digits: what processes and machines round differently is not to matter.
        """
        assert setup.mean_loss is not None, "the engine gives it"  # noqa: S101
        before = setup.mean_loss(setup.model)
        with as_stored(setup.model):
            after = setup.mean_loss(setup.model)
        with torch.no_grad():
            distance = sum(float((twin.weight - twin.compressed()).double().square().sum()) for twin in self.twins)
        cost = max(after - before, _LEAST * abs(before))
        return float(f"{2 * cost / distance:.1e}") if cost > 0 and distance > 0 and math.isfinite(cost) else 1.0


def _prune_together(chosen: Sequence[tuple[Twin, Tensor]]) -> None:
    """Keep the largest values of all targets together, as many as the layers' settings keep."""
    sizes = [target.numel() for _, target in chosen]
    count = 0
    for twin, target in chosen:
        assert isinstance(twin.planned, Sparse), "it was chosen for that"  # noqa: S101
        count += twin.planned.kept(target.numel())
    kept = keep_largest(torch.cat([target.reshape(-1) for _, target in chosen]), count)
    for (twin, target), values in zip(chosen, torch.split(kept, sizes), strict=True):
        twin.take(twin.planned.load(twin.shape, {"matrix": values.reshape(matrix_of(target).shape)}))


def _kind(choice: Format | Target | None) -> type[Format] | None:
    if isinstance(choice, Target):
        return choice.format
    return None if choice is None else type(choice)


def _shares_threshold(choice: Format | Target | None) -> bool:
    """Tell whether layers in this can share one threshold on their magnitudes."""
    if isinstance(choice, Target):
        return issubclass(choice.format, Sparse) and choice.options.get("m") is None
    return isinstance(choice, Sparse) and choice.m is None
