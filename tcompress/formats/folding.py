"""How a weight becomes a tensor of many modes, and comes back.

Letters: out, in as in base; k = values of the kernel (1 for a matrix); i1..id = out_modes; j1..je = in_modes.
The weight (out, in, *kernel) is padded with zeros to (i1*...*id, j1*...*je, k) and split row-major.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tcompress.errors import FormatError
from tcompress.formats.base import Shape

Modes = tuple[int, ...]


@dataclass(frozen=True)
class Folding:
    """The modes of one weight and how they are put together.

    groups: each mode of the tensor as positions in the list (i1..id, j1..je, k): ``((0, 2), (1, 3))`` pairs them.
    """

    shape: Shape
    out_modes: Modes
    in_modes: Modes
    groups: tuple[tuple[int, ...], ...]

    @property
    def kernel(self) -> int:
        """Values of the convolution's kernel; 1 for a matrix."""
        return math.prod(self.shape[2:])

    @property
    def flat(self) -> Modes:
        """All modes in the weight's own order; a matrix has no kernel where the groups name none."""
        return (*self.out_modes, *self.in_modes, self.kernel)[: len(self._order)]

    @property
    def sizes(self) -> Modes:
        """The tensor's shape."""
        return tuple(math.prod([self.flat[position] for position in group]) for group in self.groups)

    @property
    def padded(self) -> tuple[int, int]:
        """Sizes of out and in after padding."""
        return math.prod(self.out_modes), math.prod(self.in_modes)

    @property
    def is_padded(self) -> bool:
        """Whether a size had to be padded."""
        return self.padded != self.shape[:2]

    def fold(self, weight: Tensor) -> Tensor:
        """Return the weight as a contiguous tensor of ``sizes``."""
        out, in_ = self.shape[:2]
        padded_out, padded_in = self.padded
        flat = weight.reshape(out, in_, self.kernel)
        if self.is_padded:
            flat = F.pad(flat, (0, 0, 0, padded_in - in_, 0, padded_out - out))
        return flat.reshape(self.flat).permute(self._order).reshape(self.sizes).contiguous()

    def unfold(self, tensor: Tensor) -> Tensor:
        """Return the weight that a tensor of ``sizes`` stands for, without the padding."""
        permuted = tensor.reshape([self.flat[position] for position in self._order])
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        flat = permuted.permute(back).reshape(*self.padded, self.kernel)
        return flat[: self.shape[0], : self.shape[1]].reshape(self.shape)

    @property
    def _order(self) -> list[int]:
        return [position for group in self.groups for position in group]


def check_modes(name: str, size: int, modes: Modes, padding: int, which: str) -> None:
    """Raise FormatError unless the modes multiply to the size, padding included.

    Padding may not double a size: a file of a few bytes could otherwise stand for a tensor that fills the memory.
    """
    needed = size + padding
    if math.prod(modes) != needed or min(modes) < 1:
        extra = f" with {padding} of padding" if padding else ""
        raise FormatError(
            f"{name}: {which}={','.join(map(str, modes))} makes {math.prod(modes)}, the weight has {size}{extra}; "
            f"choose modes whose product is {needed}"
        )
    if padding < 0 or padding > size:
        raise FormatError(f"{name}: a padding of {padding} on a size of {size} makes no sense")
