"""iterate: compress a few layers a little, train the whole, and again, layers that are compressed already included.

J. Gusak et al., "Automated multi-stage compression of neural networks" (MUSCO), 2019. Each round takes ranks part of
the way down to those of EVBMF, which is computed anew from what training made of the weights. Other than there, the
layers that save most bytes come first, not the first ones of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tcompress.checkpoint.layers import Layer, LayerKind, find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import UsageError
from tcompress.formats import Format
from tcompress.formats.svd import SVD
from tcompress.formats.tucker import Tucker
from tcompress.training.distillation import Distill
from tcompress.training.finetuning import Finetune
from tcompress.training.method_options import made, names_of
from tcompress.training.objective import Method, Objective, Setup
from tcompress.training.options import Defaults
from tcompress.workflow.plan import Plan, Rule, check_matches, exactly, plan_for
from tcompress.workflow.shrinking import check_formats

TRAINERS: dict[str, type[Method]] = {method.name: method for method in (Finetune, Distill)}
GOALS = CORE, DENSE = ("core", "dense")
_LEAST, _LEAST_POINTWISE = 8, 2  # ranks, as in the authors' program


@dataclass(frozen=True)
class Iterate(Method):
    """Compress and train in turns.

    rounds: at most; fewer where no rank comes down any more. weakening: how far a round takes ranks down to those of
    EVBMF, 1 being all the way. layers: how many a round compresses; None for all that save bytes. keep: the fraction of
    the checkpoint's bytes at which no layer more is compressed. towards: ``core``, the ranks that EVBMF gives a layer
    as it is in each round, as MUSCO has it, and the second time it often leaves nothing out; ``dense``, those that it
    gives the dense weight. by: the method that trains. through_codes, alpha, temperature, kl_direction: options of that
    method, of those that it has; None for its own default.

    The epochs asked for are those of all rounds together, in equal parts.
    """

    rounds: int = 3
    weakening: float = 0.8
    layers: int | None = None
    keep: float | None = None
    towards: str = CORE
    by: str = Finetune.name
    through_codes: bool | None = None
    alpha: float | None = None
    temperature: float | None = None
    kl_direction: str | None = None

    name: ClassVar[str] = "iterate"
    summary: ClassVar[str] = "compress a few layers a little, train all, and again; from the dense model"
    reference: ClassVar[str] = "Gusak et al. 2019 (MUSCO)"
    defaults: ClassVar[Defaults] = Defaults(epochs=9, lr=1e-3)
    uses: ClassVar[tuple[str, ...]] = Distill.uses
    starts_dense: ClassVar[bool] = True
    by_epochs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rounds", "layers"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 < self.weakening <= 1:
            raise UsageError(f"weakening must be above 0 and at most 1, got {self.weakening:g}")
        if self.keep is not None and (not isinstance(self.keep, float) or not 0 < self.keep < 1):
            raise UsageError(f"keep must be a fraction above 0 and below 1, got {self.keep!r}")
        if self.towards not in GOALS:
            raise UsageError(f"towards: {self.towards!r} is none of {', '.join(GOALS)}")
        if self.by not in TRAINERS:
            raise UsageError(f"by: {self.by!r} is none of {', '.join(TRAINERS)}")
        self._made_trainer()  # its options are checked

    @property
    def trainer(self) -> Method:
        """The method that each round trains with."""
        return self._made_trainer()

    def _made_trainer(self) -> Method:
        """Return the method that trains. Raises UsageError for options that it does not have."""
        asked = {option: getattr(self, option) for method in TRAINERS.values() for option in names_of(method)}
        said = {option: value for option, value in asked.items() if value is not None}
        return made(TRAINERS[self.by], said, f"{self.name}:by={self.by}")

    def objective(self, setup: Setup) -> Objective:
        return self.trainer.objective(setup)

    def check_plan(self, plan: Plan) -> None:
        check_formats(plan)

    def own_plan(self, checkpoint: Checkpoint, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Plan | None:
        """Return the plan of MUSCO: Tucker-2 for convolutions, svd for those of one point and for linear layers.

        Its ranks are the least that layers come down to. Embeddings are left alone.
        """
        if is_compressed(checkpoint):  # which is refused later, by its name
            return None
        chosen, layers = plan_for(SVD(rank=1), include=include, exclude=exclude), find_layers(checkpoint)
        try:
            check_matches(chosen, layers)
        except UsageError as error:
            raise UsageError(error.reason, path=checkpoint.path) from error
        wanted = [layer for layer in layers if (rule := chosen.rule_for(layer.name)) is not None and rule.format]
        rules = [Rule(exactly(layer.name), _least(layer)) for layer in wanted if layer.kind != LayerKind.EMBEDDING]
        return Plan(tuple(rules))


def _least(layer: Layer) -> Format:
    if layer.kind == LayerKind.LINEAR:
        return SVD(rank=_LEAST)
    if math.prod(layer.shape[2:]) == 1:
        return SVD(rank=_LEAST_POINTWISE)
    return Tucker(ranks=(_LEAST, _LEAST))
