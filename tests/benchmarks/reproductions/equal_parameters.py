"""(d), (f), (g): formats with as many values each, fitted to a trained network and trained on, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from reproductions.base import Conditions, Reproduction, Row
from reproductions.lenet import EPOCHS, plan_within, trained
from reproductions.networks import accuracy
from tcompress.formats import Format
from tcompress.formats.cp import CP
from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.shuffled import Shuffled
from tcompress.formats.sparse_product import SparseProduct
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker

Makers = dict[str, Callable[[int], Format]]
PARTS = (0.1, 0.05)  # of the values of the hidden layers
SETTING = f"""LeNet-300-100 on MNIST (dense 97.87): both hidden layers in one format, at the largest setting that has no
more values than said, positions not counted; `compress`, then `finetune` for {EPOCHS} epochs at lr 3e-3. Test
accuracy, %."""

OF_MATRICES: Makers = {
    "sparse-product, 2 factors": lambda n: SparseProduct(nonzeros=n),
    "sparse-product, 3 factors": lambda n: SparseProduct(nonzeros=n, count=3),
    "svd": lambda n: SVD(rank=n),
    "ttm": lambda n: TTMatrix(rank=n),
    "tt": lambda n: TT(rank=n),
    "tucker": lambda n: Tucker(rank=n),
    "cp": lambda n: CP(rank=n),
}
OF_TERMS: Makers = {
    "reshaped-sum, channel and paired": lambda n: ReshapedSum(rank=n),
    "svd alone": lambda n: SVD(rank=n),
    "paired alone (ttm of two cores)": lambda n: ReshapedSum(rank=n, reshapes=("paired",)),
}
OF_ORDER: Makers = {
    "svd": lambda n: SVD(rank=n),
    "svd, entries shuffled": lambda n: Shuffled(rank=n, inner="svd"),
    "ttm": lambda n: TTMatrix(rank=n),
    "ttm, entries shuffled": lambda n: Shuffled(rank=n, inner="ttm"),
}


def rows_of(makers: Makers, claim: str, source: str) -> Callable[[Conditions], Iterator[Row]]:
    """Return what trains every format at every part."""

    def rows(given: Conditions) -> Iterator[Row]:
        for part in PARTS:
            for name, make in makers.items():
                plan, kept = plan_within(make, part)
                run = f"{name}, {part:.0%}: {kept} values"
                if len(plan.rules) < 2:
                    yield Row(run, "accuracy", "no setting is so small", claim, source)
                    continue
                result = trained(given, plan)
                yield Row(run, "before training", accuracy(result.before.scores), "", "")
                yield Row(run, "accuracy", accuracy(result.after.scores), claim, source)

    return rows


SPARSE_PRODUCTS = Reproduction(
    "sparse products against low-rank formats at equal values",
    SETTING,
    rows_of(OF_MATRICES, "sparse products trade off better", "abstract of Giffon et al. 2021"),
)
RESHAPED_SUM = Reproduction(
    "a sum of reshaped low-rank matrices against one term at equal values",
    SETTING,
    rows_of(OF_TERMS, "the sum is effective", "abstract of Idelbayev & Carreira-Perpinan 2021"),
)
SHUFFLED = Reproduction(
    "entries in random order against their own, trained",
    SETTING,
    rows_of(OF_ORDER, "shuffled is as good, and steadier", "abstract of Li et al. 2018"),
)
