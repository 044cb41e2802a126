"""(b), (e), (i): ways to train at one size, side by side."""

from __future__ import annotations

from collections.abc import Iterator

from reproductions.base import Conditions, Reproduction, Row
from reproductions.lenet import trained
from reproductions.networks import accuracy
from tcompress.formats import find_format
from tcompress.formats.sparse import Sparse
from tcompress.formats.svd import SVD
from tcompress.workflow.plan import Plan, Target, plan_for

LRS = "Hawkins et al. 2021"
LC = "the authors' program, examples of LeNet-300"
_KEEP = 0.05
_EPOCHS, _LC_EPOCHS = 6, 8


def by_learning_compression(given: Conditions) -> Iterator[Row]:
    """Prune to 5 % of the weights by one threshold, and learn the ranks of all layers."""
    runs = {
        "5 % of all weights": (plan_for(Sparse(density=0.05)), "lc:one_threshold=true", "2.18"),
        "learnt ranks, alpha=2e-5": (plan_for(SVD(rank=8)), "lc:alpha=2e-5", "1.90"),
    }
    for run, (plan, method, error) in runs.items():
        result = trained(given, plan, method, epochs=_LC_EPOCHS, lr=5e-3)
        yield Row(f"{run}, --method {method}", "bytes", str(result.after.nbytes), "", "")
        missed = 100 - float(result.after.scores["accuracy"])
        yield Row(f"{run}, --method {method}", "error, %", f"{missed:.2f}", error, LC)


def _lrs(method: str, reconstruction: str) -> Plan:
    options = {"rank": 2, "method": method, "reconstruction": reconstruction}
    return plan_for(Target(find_format("lrs"), options, keep=_KEEP))


def pruned(given: Conditions) -> Iterator[Row]:
    """Prune from the dense network to 5 % of its bytes, with and without a low-rank part; low rank alone is tuned."""
    runs = {
        "lrs rank 2, residual": (_lrs("residual", "additive"), "prune", "figure 3: no clear difference"),
        "lrs rank 2, masking": (_lrs("masking", "masking"), "prune", "figure 3: no clear difference"),
        "sparse": (plan_for(Target(find_format("sparse"), keep=_KEEP)), "prune", "figure 4: no worse than lrs"),
        "svd": (plan_for(Target(SVD, keep=_KEEP)), "distill", "figure 7: far worse"),
    }
    for run, (plan, method, claim) in runs.items():
        result = trained(given, plan, method, epochs=_EPOCHS)
        yield Row(f"{run}, --method {method}", "bytes", str(result.after.nbytes), "", "")
        yield Row(f"{run}, --method {method}", "accuracy", accuracy(result.after.scores), claim, LRS)


def matched(given: Conditions) -> Iterator[Row]:
    """Match the dense network's activations against training end to end, at one size."""
    plan = plan_for(Target(SVD, keep=0.06))
    claim = "with data reconstruction better than others"
    for method in ("finetune", "reconstruct:end_to_end=0", "reconstruct:outputs=kl", "distill"):
        result = trained(given, plan, method)
        yield Row(
            f"svd, 6 % of the bytes, --method {method}", "before training", accuracy(result.before.scores), "", ""
        )
        said = claim if method.startswith("reconstruct") else ""
        yield Row(f"svd, 6 % of the bytes, --method {method}", "accuracy", accuracy(result.after.scores), said,
                  "abstract of Su et al. 2018" if said else "")  # fmt: skip


LEARNT = Reproduction(
    "LeNet-300-100 by Learning-Compression",
    f"""MNIST, dense error 2.13 %; all layers, {_LC_EPOCHS} epochs of ten L and C steps each at lr 5e-3, where the
authors have 30 L steps of 30 epochs.""",
    by_learning_compression,
)
PRUNED = Reproduction(
    "low-rank plus sparse against sparse and low rank alone",
    f"""LeNet-300-100 on MNIST (dense 97.87), all layers, {_KEEP:.0%} of their bytes, {_EPOCHS} epochs at lr 3e-3.
Test accuracy, %.""",
    pruned,
)
MATCHED = Reproduction(
    "layer-by-layer reconstruction against end-to-end training",
    "LeNet-300-100 on MNIST (dense 97.87), all layers, 4 epochs at lr 3e-3. Test accuracy, %.",
    matched,
)
