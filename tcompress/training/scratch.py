"""from-scratch: the factors begin at random, and learn the task in the format that the plan says.

Of the dense checkpoint only names, shapes and types are taken. Everything beside the factors is as the task's model()
makes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcompress.errors import UsageError
from tcompress.runtime.install import collect
from tcompress.runtime.learning import Learning
from tcompress.runtime.modules import Factorized, FactorizedEmbedding
from tcompress.runtime.packed import Held, PackedFactorization, held_in
from tcompress.training.batches import seed_all
from tcompress.training.coded import through_codes
from tcompress.training.finetuning import TaskLoss
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults

INITS = ("random",)
_HALVINGS = 60  # of the range in which the scale of a layer's factors is looked for
_LARGEST = 2.0**20  # of that scale; its inverse is the smallest


@dataclass(frozen=True)
class FromScratch(Method):
    """Train factors that are drawn anew on the task's loss.

    init: ``random``, normal values in every factor, of one size in all of a layer's. through_codes: as of ``finetune``,
    in the second half of the steps: values that are far from what they will be have to move freely first.
    """

    init: str = "random"
    through_codes: bool = True

    name: ClassVar[str] = "from-scratch"
    summary: ClassVar[str] = (
        "the task's loss, from random factors in the plan's formats; of MODEL only shapes are taken"
    )
    reference: ClassVar[str] = "Novikov et al. 2015"
    defaults: ClassVar[Defaults] = Defaults(epochs=10, lr=3e-3)
    starts_dense: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise UsageError(f"--method from-scratch: init is one of {', '.join(INITS)}, got {self.init!r}")

    def prepare(self, setup: Setup, dense: nn.Module | None) -> None:
        del dense
        seed_all(setup.seed, 0)
        _take_others(setup.model, setup.task.model())
        draw(setup.model, torch.Generator().manual_seed(setup.seed))

    def objective(self, setup: Setup) -> Objective:
        return Beginning(setup.task, through_codes(setup.model, asked=self.through_codes))


class Beginning(TaskLoss):
    """The task's loss; the model before its first step is none that was asked for."""

    def begin_step(self, step: int, steps: int) -> None:
        half = -(-steps // 2)
        if self._codes is not None:
            self._codes.begin(anew=step == half, waits=step < half)
        super().begin_step(step, steps)

    def may_be_written(self, epoch: int) -> bool:
        return epoch > 0


def _take_others(model: nn.Module, fresh: nn.Module) -> None:
    """Give the model all that a fresh one has, but for the factors.

    Raises UsageError for what would stay as it was trained.
    """
    theirs, learning = fresh.state_dict(), dict(fresh.named_parameters())
    for name, parameter in model.named_parameters():
        if name in learning and learning[name].requires_grad and not parameter.requires_grad:
            problem = "is compressed, and stays dense in this model: it would keep its trained values"
            raise UsageError(f"{problem}; leave it out with --exclude", tensor=name)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in theirs:
                tensor.copy_(theirs[name])


def draw(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all factors of a model that ``let_learn`` has made ready, and the places of sparse ones.

    Each layer's weight, multiplied out, has the mean square that torch's layers begin with: 1 / (3 fan_in), and 1 in
    embeddings. All factors of a layer have one standard deviation, by which that is so. Factors that layers share are
    drawn once; what comes to them later is scaled by its own factors.
    """
    once: dict[int, Held] = {}
    kept: list[Mapping[str, Held]] = []  # so that no identity is given twice
    for name, layer in collect(model).items():
        held = held_in(layer.factors)
        kept.append(held)
        new = {factor for factor, each in held.items() if id(each) not in once}
        supports = _supports(layer, held, generator) if new else {}
        for factor in held:
            if factor in new:
                once[id(held[factor])] = _drawn(name, held[factor], supports.get(factor), generator)
        if not new:
            continue
        factors = {factor: once[id(each)] for factor, each in held.items()}
        if any(isinstance(each, Learning) for each in factors.values()):
            layer.hold(PackedFactorization(layer.setting, layer.factors.shape, factors))
        _scale(layer, [_values(factors[factor]) for factor in held if factor in new])


def _supports(layer: Factorized, held: Mapping[str, Held], generator: torch.Generator) -> dict[str, Tensor]:
    """Return where the values of sparse factors are to be: where the format puts them of a weight of pure noise."""
    if not any(isinstance(each, Learning) and each.is_placed for each in held.values()):
        return {}
    noise = torch.randn(layer.factors.shape, generator=generator)
    found = layer.setting.quicker().fit(noise)
    return {name: factor.detach() != 0 for name, factor in found.named_parameters()}


def _drawn(name: str, held: Held, support: Tensor | None, generator: torch.Generator) -> Held:
    """Return a factor with new values; with new places too, where it has places."""
    if not isinstance(held, nn.Parameter | Learning):
        problem = "does not learn (requires_grad is false in the task's model), and would keep its trained values"
        raise UsageError(f"{problem}; leave it out with --exclude", tensor=name)
    values = torch.randn(held.shape, generator=generator)
    if isinstance(held, Learning) and held.is_placed:
        assert support is not None, "the format has said it"  # noqa: S101
        learns = held.values.requires_grad
        sparse = torch.where(support, values, 0).to(held.values.device)
        return Learning(sparse, held.dtype, held.coding, fixed=True).requires_grad_(learns)
    with torch.no_grad():
        _values(held).copy_(values.reshape(_values(held).shape))
    return held


def _values(held: Any) -> Tensor:
    return held.values if isinstance(held, Learning) else held


def _scale(layer: Factorized, values: list[Tensor]) -> None:
    """Multiply values of factors by the one number by which the weight has its mean square."""
    fan_in = math.prod(layer.factors.shape[1:])
    wanted = 1.0 if isinstance(layer, FactorizedEmbedding) else 1 / (3 * fan_in)
    before = [each.detach().clone() for each in values]
    low, high = -math.log2(_LARGEST), math.log2(_LARGEST)
    with torch.no_grad():
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            for each, was in zip(values, before, strict=True):
                each.copy_(was * 2.0**middle)
            square = float(layer.factors.reconstruct().square().mean(dtype=torch.float64))
            low, high = (middle, high) if square < wanted else (low, middle)
