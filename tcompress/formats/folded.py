"""What the formats have in common that fold the weight into a tensor and cut its ranks: tt, ttm, tucker, cp.

Letters: n_k = sizes of the tensor's modes; R = the largest rank allowed; r_k = the ranks that come of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tcompress.encodings import FactorSpec
from tcompress.errors import FormatError
from tcompress.formats.base import Format, Shape, largest, listed, require_count, require_matrix_like
from tcompress.formats.folding import Folding, Modes, check_modes
from tcompress.formats.outlook import Outlook, of_unfoldings
from tcompress.linalg.distance import compare
from tcompress.linalg.folding import balanced_modes

Ranks = tuple[int, ...]
MOST_MODES = 16  # a side: 2^16 is beyond the size of most layers, and tensors of very many modes are slow


@dataclass(frozen=True)
class Folded(Format):
    """A rank for all, or a rank each; and how the weight is folded, where the rule of the format is not wanted.

    rank: the largest of all ranks. ranks: one each, in the format's order. Exactly one of the two is given.
    order: number of modes that each channel size is split into; None takes as many as the other side is given, or the
    format's own number.
    out_modes, in_modes: the modes themselves. padding: zeros added to out and to in before they are split.
    """

    rank: int | None = None
    ranks: Ranks | None = None
    order: int | None = None
    out_modes: Modes | None = None
    in_modes: Modes | None = None
    padding: tuple[int, int] = (0, 0)

    size_option: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.ranks is None):
            raise FormatError(f"{self.name}: give one of rank and ranks")
        if self.rank is not None:
            require_count(self.name, "rank", self.rank)
        if self.order is not None:
            require_count(self.name, "order", self.order)
            if self.order > MOST_MODES:
                raise FormatError(f"{self.name}: order is at most {MOST_MODES}, got {self.order}")
            if self.out_modes is not None or self.in_modes is not None:
                raise FormatError(f"{self.name}: order is how many modes are chosen; give it or the modes")
        for option in ("ranks", "out_modes", "in_modes"):
            self._require_counts(option, getattr(self, option))
        if type(self.padding) is not tuple or len(self.padding) != 2:
            raise FormatError(f"{self.name}: padding is two whole numbers, for out and in, got {self.padding!r}")
        for amount in self.padding:
            require_count(self.name, "padding", amount, least=0)

    def _require_counts(self, option: str, values: Any) -> None:
        if values is None:
            return
        if type(values) is not tuple or not values:
            raise FormatError(f"{self.name}: {option} is a list of whole numbers as 4,8,4, got {values!r}")
        if len(values) > 2 * MOST_MODES or (option != "ranks" and len(values) > MOST_MODES):
            raise FormatError(f"{self.name}: {option} has {len(values)} entries, more than {MOST_MODES} modes a side")
        for value in values:
            require_count(self.name, option, value)

    @classmethod
    @abstractmethod
    def usual_order(cls, shape: Shape) -> int:
        """Return how many modes each channel size of this weight is split into."""

    @classmethod
    @abstractmethod
    def groups(cls, outs: int, ins: int, *, kernel: bool) -> tuple[tuple[int, ...], ...]:
        """Return how so many out modes, in modes and a kernel are put together, as Folding has it."""

    @classmethod
    @abstractmethod
    def full_ranks(cls, folding: Folding) -> Ranks:
        """Return the ranks beyond which nothing is gained, whatever the weight."""

    @classmethod
    @abstractmethod
    def factor_shapes(cls, folding: Folding, ranks: Ranks) -> Mapping[str, Shape]:
        """Return the shape of each factor at these ranks."""

    @classmethod
    def reduced(cls, folding: Folding, ranks: Ranks) -> Ranks:
        """Return the smaller ranks that give the same weights: a rank cannot be used where its neighbours are low."""
        del folding
        return ranks

    def folding(self, shape: Shape) -> Folding:
        """Return how a weight of this shape is folded. Raises FormatError when the modes do not fit it."""
        require_matrix_like(self.name, shape)
        order = self.order or len(self.out_modes or self.in_modes or ()) or self.usual_order(shape)
        sides = []
        for size, modes, padding, which in (
            (shape[0], self.out_modes, self.padding[0], "out_modes"),
            (shape[1], self.in_modes, self.padding[1], "in_modes"),
        ):
            if modes is None:
                if padding:
                    raise FormatError(f"{self.name}: padding is given beside {which}, which are not")
                sides.append(self._split(size, order, which))
            else:
                check_modes(self.name, size, modes, padding, which)
                sides.append(modes)
        out_modes, in_modes = sides
        return Folding(shape, out_modes, in_modes, self.groups(len(out_modes), len(in_modes), kernel=len(shape) > 2))

    @classmethod
    def _split(cls, size: int, order: int, which: str) -> Modes:
        del which
        return balanced_modes(size, order)

    @classmethod
    def unfoldings(cls, tensor: Tensor) -> list[Tensor]:
        """Return the unfoldings (rows, columns) whose ranks are those of ``clipped``, in their order."""
        del tensor
        return []

    @classmethod
    def outlook(cls, weight: Tensor) -> Outlook | None:
        folding = cls(rank=1).folding(tuple(weight.shape))
        found = cls.unfoldings(folding.fold(weight))
        return of_unfoldings(found, lambda setting: setting.clipped(folding)) if found else None

    def clipped(self, folding: Folding) -> Ranks:
        """Return the ranks really used. Raises FormatError when another number of them was given than there are."""
        full = self.full_ranks(folding)
        if self.ranks is not None and len(self.ranks) != len(full):
            raise FormatError(
                f"{self.name}: {len(self.ranks)} ranks are given, modes {listed(folding.sizes)} have {len(full)}"
            )
        asked = self.ranks if self.ranks is not None else (self.rank or 1,) * len(full)
        return self.reduced(folding, tuple(map(min, asked, full)))

    def pinned(self, shape: Shape) -> Self:
        folding = self.folding(shape)
        padding = (folding.padded[0] - shape[0], folding.padded[1] - shape[1])
        return replace(self, order=None, out_modes=folding.out_modes, in_modes=folding.in_modes, padding=padding)

    def notes(self, shape: Shape) -> tuple[str, ...]:
        folding = self.folding(shape)
        found = [
            f"{size} is padded to {padded}"
            for size, padded in zip(shape[:2], folding.padded, strict=True)
            if padded != size
        ]
        ranks = self.clipped(folding)
        if self.ranks is not None and ranks != self.ranks:
            found.append(f"ranks {listed(self.ranks)} are clipped to {listed(ranks)}")
        if self.rank is not None and ranks and self.rank > max(ranks):
            found.append(f"rank {self.rank} is clipped to {max(ranks)}")
        return tuple(found)

    def factor_specs(self, shape: Shape, dtype: torch.dtype, nonzeros: int | None = None) -> Mapping[str, FactorSpec]:
        del nonzeros  # factors of a sparse weight are dense all the same
        folding = self.folding(shape)
        shapes = self.factor_shapes(folding, self.clipped(folding))
        return {name: FactorSpec(size, dtype) for name, size in shapes.items()}

    @classmethod
    def within(cls, shape: Shape, dtype: torch.dtype, budget_bytes: int, **options: Any) -> Self | None:
        most = max(cls.full_ranks(cls(**{**options, "rank": 1}).folding(shape)), default=1)

        def fits(rank: int) -> bool:
            return rank == 0 or cls(**{**options, "rank": rank}).stored_bytes(shape, dtype) <= budget_bytes

        rank = largest(fits, most)
        return cls(**{**options, "rank": rank})._filled(shape, dtype, budget_bytes) if rank else None

    def _filled(self, shape: Shape, dtype: torch.dtype, budget_bytes: int) -> Self:
        """Raise single ranks by one as far as the budget allows: a step of all at once can be a large one."""
        folding = self.folding(shape)
        even = ranks = self.clipped(folding)
        for position, rank in enumerate(even):
            raised = replace(self, rank=None, ranks=(*ranks[:position], rank + 1, *ranks[position + 1 :]))
            is_higher = rank == self.rank and raised.clipped(folding)[position] > rank
            if is_higher and raised.stored_bytes(shape, dtype) <= budget_bytes:
                ranks = raised.clipped(folding)
        return self if ranks == even else replace(self, rank=None, ranks=ranks)

    def richer(self, shape: Shape) -> Self | None:
        folding = self.folding(shape)
        full = self.reduced(folding, self.full_ranks(folding))
        if self.clipped(folding) == full:
            return None
        if self.rank is not None:
            return replace(self, rank=self.rank + 1)
        return replace(self, ranks=tuple(min(r + 1, most) for r, most in zip(self.clipped(folding), full, strict=True)))

    def trimmed(self, weight: Tensor, relative_error: float) -> Self:
        """Lower the last of the ranks as long as the fit stays within the error.

        Ranks found by successive truncation leave room where padding is cut off or sweeps lower the error afterwards.
        """
        setting = self
        while setting.ranks is not None and setting.ranks[-1] > 1:
            poorer = replace(setting, ranks=(*setting.ranks[:-1], setting.ranks[-1] - 1))
            if compare(weight, poorer.fit(weight).reconstruct().detach())[1] > relative_error:
                break
            setting = poorer
        return setting

    def require_factors(self, shape: Shape, factors: Mapping[str, Tensor], ranks: Ranks) -> Folding:
        """Return the folding. Raises FormatError unless the factors have the shapes that these ranks give them."""
        folding = self.folding(shape)
        full = self.full_ranks(folding)
        # Ranks above the full ones gain nothing, and a small file could ask for much memory with them.
        if len(ranks) != len(full) or any(not 1 <= rank <= most for rank, most in zip(ranks, full, strict=False)):
            raise FormatError(
                f"{self.name}: has factors {sorted(factors)}, which are not those of modes {listed(folding.sizes)}"
            )
        expected = self.factor_shapes(folding, ranks)
        if set(factors) != set(expected):
            raise FormatError(f"{self.name}: has factors {sorted(factors)}, needs {sorted(expected)}")
        for name, size in expected.items():
            if tuple(factors[name].shape) != size:
                raise FormatError(
                    f"{self.name}: factor {name} of shape {tuple(factors[name].shape)} does not make {shape}, "
                    f"it needs {size}"
                )
        return folding
