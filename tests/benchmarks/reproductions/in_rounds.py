"""(c): compressing and training in rounds, against all at once at the same ranks and for as many epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import tcompress
from reproductions.base import Conditions, Reproduction, Row
from reproductions.lenet import LENET
from reproductions.networks import accuracy
from tcompress.formats.svd import SVD
from tcompress.training.objective import Method
from tcompress.training.tuning import TuningResult
from tcompress.workflow.decoding import view
from tcompress.workflow.plan import Plan, Rule, exactly

METHODS = (
    "iterate:rounds=2:weakening=0.5:towards=dense",
    "iterate:rounds=4:weakening=0.5:towards=dense",
    "iterate:rounds=2:layers=1",
)
EPOCHS = 8
CLAIM, SOURCE = "rounds give no less", "Gusak et al. 2019 (MUSCO)"


@dataclass(frozen=True)
class Pair:
    """Both ways to one size. settings: of each layer, those that the last round came to."""

    settings: Mapping[str, SVD]
    rounds: TuningResult
    at_once: TuningResult

    @property
    def ranks(self) -> str:
        """The ranks of svd, in the order of the layers."""
        return ",".join(str(setting.rank) for setting in self.settings.values())


def pair(given: Conditions, method: Method | str, epochs: int) -> Pair:
    """Take the dense network through rounds, then compress it to the same settings and finetune that.

    All but the epochs is as the two methods have it.
    """
    rounds = LENET.trained(given, None, method, epochs, lr=None)
    settings = _settings(rounds.output.path)
    plan = Plan(tuple(Rule(exactly(name), setting) for name, setting in settings.items()))
    return Pair(settings, rounds, LENET.trained(given, plan, "finetune", epochs, lr=None))


def _settings(path: Path) -> dict[str, SVD]:
    with tcompress.open_checkpoint(path) as checkpoint:
        found = view(checkpoint)
        return {name: found.setting(name) for name in found.manifest.layers}


def rows(given: Conditions) -> Iterator[Row]:
    """Take the network through rounds of three kinds, each beside all at once."""
    for method in METHODS:
        found = pair(given, method, EPOCHS)
        once = f"svd of ranks {found.ranks}, at once"
        yield Row(once, "bytes", str(found.at_once.output.nbytes), "", "")
        yield Row(once, "before training", accuracy(found.at_once.before.scores), "", "")
        yield Row(once, "accuracy", accuracy(found.at_once.after.scores), "", "")
        yield Row(f"--method {method}", "accuracy", accuracy(found.rounds.after.scores), CLAIM, SOURCE)


REPRODUCTION = Reproduction(
    "rounds of compressing and training against all at once",
    f"""LeNet-300-100 on MNIST (dense 97.87): the dense network through `iterate`, then `compress` to the ranks that the
last round came to and `finetune`, {EPOCHS} epochs for both, with the defaults of both methods. Test accuracy, %. Seeds
beside each other: iterating.py.""",
    rows,
)
