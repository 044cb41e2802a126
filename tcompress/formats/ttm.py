"""ttm: the tensor-train matrix: out and in modes in pairs, (i1 j1)(i2 j2)..., and one spatial core for a convolution.

Letters: i1..id = out_modes; j1..jd = in_modes, as many; k = values of the kernel; core l is (r_{l-1}, i_l, j_l, r_l),
the spatial core (r, k, 1, 1). With rank 1 the matrix is a Kronecker product of its cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tcompress.errors import FormatError
from tcompress.formats.base import CONV, Factorization, Shape
from tcompress.formats.effort import dense_effort
from tcompress.formats.folded import Ranks
from tcompress.formats.folding import Folding, Modes
from tcompress.formats.for_output import refined
from tcompress.formats.tt import TT, cores_of
from tcompress.linalg.folding import balanced_modes
from tcompress.linalg.scaling import even_ranges
from tcompress.linalg.tensor_train import tt_full, tt_svd

_CONV_SLOWNESS = 30.0  # its convolution has one channel for each output, which no library is quick at
_STATE_AT_ONCE = 1 << 19  # values between two cores: with more of them a training step takes up to twice as long


@dataclass(frozen=True)
class TTMatrix(TT):
    """Tensor-train matrix of rank at most ``rank`` at every cut, or of the given ``ranks``."""

    name: ClassVar[str] = "ttm"
    summary: ClassVar[str] = "tensor-train matrix: out and in modes in pairs, a spatial core for convolutions (r-TT)"
    rebuild: ClassVar[str] = "unfold(train(cores); i1, j1, i2, j2, ..., k)"
    reference: ClassVar[str] = "Oseledets 2010; Novikov et al. 2015 (TT-layer); Su et al. 2018 (r-TT)"
    quick: ClassVar[bool] = True

    @classmethod
    def _split(cls, size: int, order: int, which: str) -> Modes:
        # Pairs of equal size: the largest out mode goes with the smallest in mode.
        modes = balanced_modes(size, order)
        return modes if which == "out_modes" else modes[::-1]

    @classmethod
    def groups(cls, outs: int, ins: int, *, kernel: bool) -> tuple[tuple[int, ...], ...]:
        if outs != ins:
            raise FormatError(f"ttm: pairs out_modes with in_modes, but there are {outs} and {ins}")
        pairs = [(pair, outs + pair) for pair in range(outs)]
        return (*pairs, (2 * outs,)) if kernel else tuple(pairs)

    @classmethod
    def factor_shapes(cls, folding: Folding, ranks: Ranks) -> Mapping[str, Shape]:
        around, modes = (1, *ranks, 1), _pairs(folding)
        return {f"cores.{k}": (around[k], *pair, around[k + 1]) for k, pair in enumerate(modes)}

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Factorization:
        folding = self.folding(tuple(weight.shape))
        cores = even_ranges(tt_svd(folding.fold(weight), self.clipped(folding)))
        pairs = _pairs(folding)
        paired = [core.reshape(core.shape[0], *pair, -1) for core, pair in zip(cores, pairs, strict=True)]
        return refined(TensorTrainMatrix(folding, paired), weight, gram)

    def load(self, shape: Shape, factors: Mapping[str, Tensor]) -> Factorization:
        cores = cores_of(factors)
        folding = self.require_factors(shape, factors, tuple(core.shape[-1] for core in cores[:-1]))
        return TensorTrainMatrix(folding, cores)


class TensorTrainMatrix(Factorization):
    """cores: (r_{l-1}, i_l, j_l, r_l) each."""

    def __init__(self, folding: Folding, cores: list[Tensor]) -> None:
        super().__init__()
        self.shape, self.folding = folding.shape, folding
        self.cores = nn.ParameterList(cores)

    def reconstruct(self) -> Tensor:
        return self.folding.unfold(tt_full([core.flatten(1, 2) for core in self.cores]))

    def operations(self, *, groups: int = 1, steps: int = 1) -> int:
        if groups != 1:  # the outputs of one group are no block of the modes: it takes the dense kernel
            return super().operations()
        if len(self.shape) == 2:
            return _operations(list(self.cores))
        *channels, spatial = self.cores
        return _operations(channels) * steps + self.shape[0] * int(spatial.numel())

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        found = super().effort(n, groups=groups, steps=steps)
        return found if len(self.shape) == 2 else _CONV_SLOWNESS * found

    def linear(self, x: Tensor) -> Tensor:
        cores = list(self.cores)
        if not self.saves():
            return super().linear(x)
        parts = torch.split(x.reshape(-1, self.shape[1]), self._at_once(x))
        answers = [self._through(part, cores)[:, :, 0] for part in parts]
        whole = answers[0] if len(answers) == 1 else torch.cat(answers)
        return whole.reshape(*x.shape[:-1], self.shape[0])

    def _at_once(self, x: Tensor) -> int:
        """Return how many inputs go through the cores together: few where all states are kept for their gradients."""
        count = max(1, math.prod(x.shape[:-1]))
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return count
        return min(count, max(1, _STATE_AT_ONCE // _largest_state(list(self.cores))))

    def conv(self, x: Tensor, **geometry: Any) -> Tensor:
        if not self.saves(**geometry):
            return super().conv(x, **geometry)
        out, in_ = self.shape[:2]
        *channels, spatial = self.cores
        batch, sizes = x.shape[0], x.shape[2:]
        inner = self._through(x.movedim(1, -1).reshape(-1, in_), channels)  # (batch * positions, out, rank)
        rank = inner.shape[2]
        inner = inner.reshape(batch, math.prod(sizes), out, rank).permute(0, 2, 3, 1).reshape(batch * out, rank, *sizes)
        result: Tensor = CONV[len(self.shape)](inner, spatial.reshape(1, rank, *self.shape[2:]), **geometry)
        whole: Tensor = result.reshape(batch, out, *result.shape[2:])
        return whole

    def embedding(self, ids: Tensor) -> Tensor:
        cores = list(self.cores)
        width, whole = self.shape[1], math.prod(self.folding.padded)
        if ids.numel() * sum(core[:, 0].numel() for core in cores) * width >= whole * cores[-1].shape[0]:
            return super().embedding(ids)
        flat = ids.reshape(-1)
        places = digits(flat, self.folding.out_modes, self.shape[0])
        rows: Tensor = cores[0].new_ones(len(flat), 1, 1)  # (ids, columns so far, rank)
        for core, digit in zip(cores, places, strict=True):
            chosen = core[:, digit].movedim(1, 0)  # (ids, r, j, r')
            rows = torch.einsum("ncr,nrjs->ncjs", rows, chosen).flatten(1, 2)
        return rows[:, :width, 0].reshape(*ids.shape, width)

    def _through(self, x: Tensor, cores: list[Tensor]) -> Tensor:
        """Return (inputs, out, rank of the last core) for x: (inputs, in), contracting core after core."""
        padded_in = self.folding.padded[1]
        if padded_in != x.shape[1]:
            x = torch.nn.functional.pad(x, (0, padded_in - x.shape[1]))
        return contracted(x, [_as_matrix(core) for core in cores], cores)[:, : self.shape[0]]

    def prepared(self) -> Factorization:
        return self if len(self.shape) > 2 else PreparedTrain(self.folding, list(self.cores))


class PreparedTrain(Factorization):
    """A tensor-train matrix that runs through its cores whatever they take beside the dense weight."""

    def __init__(self, folding: Folding, cores: list[Tensor]) -> None:
        super().__init__()
        self.shape, self.folding = folding.shape, folding
        self.cores = [core.detach() for core in cores]
        self.matrices = [_as_matrix(core).contiguous() for core in self.cores]

    def reconstruct(self) -> Tensor:
        return self.folding.unfold(tt_full([core.flatten(1, 2) for core in self.cores]))

    def effort(self, n: int, *, groups: int = 1, steps: int = 1) -> float:
        del groups, steps
        # The cores are read once, and used again and again for one input: unlike a dense weight they stay at hand.
        used = _operations(self.cores) * n
        return dense_effort(sum(core.numel() for core in self.cores), 1, calls=2 * len(self.cores)) + used

    def linear(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.shape[1])
        if self.folding.is_padded:
            flat = torch.nn.functional.pad(flat, (0, self.folding.padded[1] - self.shape[1]))
        found = contracted(flat, self.matrices, self.cores)[:, : self.shape[0], 0]
        return found.reshape(*x.shape[:-1], self.shape[0])


def _as_matrix(core: Tensor) -> Tensor:
    """Return a core (r, i, j, s) as the (i s, r j) matrix that it multiplies with."""
    rank, i, j, after = core.shape
    return core.permute(1, 3, 0, 2).reshape(i * after, rank * j)


def contracted(x: Tensor, matrices: list[Tensor], cores: list[Tensor]) -> Tensor:
    """Return (inputs, out, rank of the last core) for x: (inputs, in); no step has to move values to other places."""
    state = x  # (inputs, outputs so far, rank, inputs left), flattened
    outputs = 1
    left = x.shape[1]
    for core, matrix in zip(cores, matrices, strict=True):
        rank, i, j, _ = core.shape
        left //= j
        rows = x.shape[0] * outputs
        if left == 1:
            state = torch.nn.functional.linear(state.reshape(rows, rank * j), matrix)
        else:
            state = torch.matmul(matrix, state.reshape(rows, rank * j, left))
        outputs *= i
    return state.reshape(x.shape[0], outputs, cores[-1].shape[3])


def _pairs(folding: Folding) -> list[tuple[int, int]]:
    """Return (i, j) of each core; the spatial core has the kernel for i and 1 for j."""
    pairs = list(zip(folding.out_modes, folding.in_modes, strict=True))
    return [*pairs, (folding.kernel, 1)] if len(folding.shape) > 2 else pairs


def _operations(cores: list[Tensor]) -> int:
    """Multiplications per input on the way through the cores, first to last."""
    total, outputs, left = 0, 1, math.prod([core.shape[2] for core in cores])
    for core in cores:
        rank, i, j, after = core.shape
        left //= j
        total += outputs * left * rank * j * i * after
        outputs *= i
    return total


def _largest_state(cores: list[Tensor]) -> int:
    """Return how many values there are at most between two cores, for one input."""
    largest, outputs, left = 1, 1, math.prod([core.shape[2] for core in cores])
    for core in cores:
        outputs, left = outputs * core.shape[1], left // core.shape[2]
        largest = max(largest, outputs * left * core.shape[3])
    return largest


def digits(ids: Tensor, modes: Modes, rows: int) -> list[Tensor]:
    """Return each id's index in every mode, row-major. Raises IndexError for ids outside of 0..rows-1."""
    has_values = not torch.compiler.is_compiling() and not ids.is_meta and ids.numel() > 0
    if has_values and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError("an id is outside of the embedding")
    found = []
    for mode in reversed(modes):
        found.append(ids % mode)
        ids = ids // mode
    return found[::-1]
