"""(h): convolutions of one shape decomposed jointly (T-Net), against each by itself at equal numbers of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

import tcompress
from reproductions.base import Conditions, Reproduction, Row
from reproductions.networks import Network, accuracy, richest, values_of
from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.formats import Format
from tcompress.formats.joint import Joint
from tcompress.formats.sparse import Sparse
from tcompress.formats.tucker import Tucker
from tcompress.linalg.distance import compare
from tcompress.workflow.plan import Plan, Rule, exactly

RESNET = Network(
    "resnet20.py", "resnet20.th", prefix="module.", limits={"TCOMPRESS_SCORED": "2000", "TCOMPRESS_TRAINED": "2000"}
)
PARTS = {"1.5": 2 / 3, "2": 1 / 2}  # of the values of the convolutions, by how many times fewer they are
EPOCHS, RATE, SCRATCH_EPOCHS = 3, 1e-3, 4
CLAIM = {True: ("superior at small rates", "abstract of Kossaifi et al. 2019"), False: ("", "")}

# Of the dense network as much as can be trained: finetune wants something compressed.
NEARLY_DENSE = Plan((Rule("module.layer3.2.conv2.weight", Sparse(density=0.95)),))

Group = Mapping[Layer, Tensor]  # layers of one shape, with their weights
Settled = tuple[Format, float, int]  # the setting of a group, its error, the values of all its factors
Settle = Callable[[Group, int], Settled]


@dataclass(frozen=True)
class JointAnyway(Joint):
    """Joint also where factors of each layer's own would have a smaller error, which `compress` refuses otherwise."""

    alternatives: ClassVar[tuple[type[Format], ...]] = ()


@dataclass(frozen=True)
class Fitted:
    """A plan. error: the root of the layers' mean squared relative errors. values: of all factors."""

    plan: Plan
    error: float
    values: int


def groups() -> list[Group]:
    """Return the convolutions of one shape: of the later stages all but the first, which widens."""
    found: dict[tuple[int, ...], dict[Layer, Tensor]] = {}
    with tcompress.open_checkpoint(RESNET.path()) as dense:
        for layer in find_layers(dense):
            if len(layer.shape) > 2:
                found.setdefault(layer.shape, {})[layer] = dense.read(layer.name)
    return [group for group in found.values() if len(group) > 1]


def jointly(group: Group, most: int) -> Settled:
    """Return the setting with the smallest error of those whose factors are no more values, over the layers' ranks."""
    shape, count = next(iter(group)).shape, len(group)

    def values(setting: Joint) -> int:
        shared, own = setting.group_specs(shape, torch.float32, count)
        return sum(spec.values for spec in shared.values()) + count * sum(spec.values for spec in own.values())

    tried = []
    for rank in range(1, count + 1):
        setting = richest(lambda n, rank=rank: JointAnyway(ranks=(rank, *_two(n))), values, most)
        if setting is not None:
            shared, own = setting.fit_together(list(group.values()))
            fits = [setting.load(shape, {**shared, **each}).reconstruct().detach() for each in own]
            tried.append((setting, _error(group.values(), fits), values(setting)))
    return min(tried, key=lambda found: found[1])


def apart(group: Group, most: int) -> Settled:
    """Return Tucker-2 for each layer by itself, the richest whose factors, of all layers, are no more values."""
    shape, count = next(iter(group)).shape, len(group)
    setting = richest(lambda n: Tucker(ranks=_two(n)), partial(values_of, shape=shape), most // count)
    assert setting is not None
    fits = [setting.fit(weight).reconstruct().detach() for weight in group.values()]
    return setting, _error(group.values(), fits), count * values_of(setting, shape)


def plan_within(settle: Settle, part: float) -> Fitted:
    """Settle each group on this part of its values."""
    rules, squares, values = [], [], 0
    for group in groups():
        setting, error, kept = settle(group, int(part * sum(layer.values for layer in group)))
        rules += [Rule(exactly(layer.name), setting) for layer in group]
        squares += [error**2] * len(group)
        values += kept
    return Fitted(Plan(tuple(rules)), math.sqrt(sum(squares) / len(squares)), values)


def score(path: Path) -> str:
    """Return the accuracy of a compressed file."""
    task = RESNET.load_task(("model", "evaluate"))
    return accuracy(task.evaluate(tcompress.load_into(task.model(), path, strip_prefix=RESNET.prefix).eval()))


def rows(given: Conditions) -> Iterator[Row]:
    """Compress jointly and apart at each rate and train that; at the first rate train from random factors as well."""
    plans = {
        f"{rate} times fewer values, {name}": (plan_within(settle, part), settle is jointly)
        for rate, part in PARTS.items()
        for name, settle in WAYS.items()
    }
    for run, (found, is_claimed) in plans.items():
        yield from _fitted_rows(given, f"{run}: {found.values}", found, is_claimed)
    yield from _trained_rows(given, "nearly dense", NEARLY_DENSE, is_claimed=False)
    for run, (found, is_claimed) in list(plans.items())[: len(WAYS)]:
        yield _scratch_row(given, run, found.plan, is_claimed)
    yield _scratch_row(given, "nearly dense", NEARLY_DENSE, is_claimed=False)


def _fitted_rows(given: Conditions, run: str, found: Fitted, is_claimed: bool) -> Iterator[Row]:
    yield Row(run, "error of the weights", f"{found.error:.3f}", "", "")
    yield Row(run, "fitted to the weights", score(RESNET.compressed(given, found.plan)), "", "")
    start = RESNET.compressed(given, found.plan, calibrated=True)
    yield from _trained_rows(given, run, start, is_claimed)


def _trained_rows(given: Conditions, run: str, start: Path | Plan, is_claimed: bool) -> Iterator[Row]:
    result = RESNET.trained(given, start, "finetune", EPOCHS, RATE)
    yield Row(run, "before training", accuracy(result.before.scores), "", "")
    yield Row(run, "trained", accuracy(result.after.scores), *CLAIM[is_claimed])


def _scratch_row(given: Conditions, run: str, plan: Plan, is_claimed: bool) -> Row:
    result = RESNET.trained(given, plan, "from-scratch", SCRATCH_EPOCHS, None)
    return Row(f"{run}, from random factors", "trained", accuracy(result.after.scores), *CLAIM[is_claimed])


def _two(number: int) -> tuple[int, int]:
    """Return two ranks that differ by one at most, one of them larger for each number more."""
    return (number + 2) // 2, (number + 1) // 2


def _error(weights: Iterable[Tensor], fits: Iterable[Tensor]) -> float:
    errors = [compare(weight, fit)[1] for weight, fit in zip(weights, fits, strict=True)]
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


WAYS: dict[str, Settle] = {"jointly": jointly, "each layer by itself": apart}
REPRODUCTION = Reproduction(
    "convolutions decomposed jointly against each by itself at equal values",
    f"""ResNet-20 on CIFAR-10: the 3x3 convolutions of each stage that have one shape, 16 of 19, by `joint` or by
`tucker`, at the richest ranks (of layers, those with the smallest error) that have no more values than said.
`compress`, without and with 1000 pictures for calibration; then `finetune` of the latter on 2000 pictures for {EPOCHS}
epochs at lr {RATE:g}, and `from-scratch` for {SCRATCH_EPOCHS}, as the paper trains, a network for human poses.
Accuracy on 2000 test pictures, %. "Nearly dense" has 5 % of one layer's values pruned, and is trained alike.""",
    rows,
)
