"""The table of all codings, and which of them takes the fewest bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tcompress.encodings.base import CODED, Coding, FactorSpec, Support, Values, bits_of, value_type
from tcompress.encodings.bitmask import Bitmask
from tcompress.encodings.csr import CSR
from tcompress.encodings.delta8 import SKIP, Delta8, gaps_between
from tcompress.encodings.dense import Dense
from tcompress.encodings.elias_fano import MOST_LOW, NAME, EliasFano, best_low_bits
from tcompress.encodings.int3 import Int3
from tcompress.encodings.int4 import Int4
from tcompress.encodings.int8 import Int8
from tcompress.encodings.masks import BITS_SET
from tcompress.encodings.n_of_m import MOST, NOfM
from tcompress.encodings.plain import Plain

# The supports; beside them there is elias-fano:l for every l <= 48, and n:m for every n < m <= 16. Values as they are
# stand first, then the supports in this order, then elias-fano, then n:m: at equal bytes the earlier coding is taken.
ENCODINGS: dict[str, Support] = {support.name: support for support in (Dense(), Bitmask(), Delta8(), CSR())}
VALUES: dict[str | None, Values] = {values.name: values for values in (Plain(), Int8(), Int4(), Int3())}

_THINNEST_MASK = 0.2  # from here on a bitmask is never larger than delta8: no need to count its skips
_WIDTHS = (4, 8, 16)  # of the groups in which a pattern is looked for


def find(encoding: str, values: str | None = None) -> Coding | None:
    """Return the coding of these names on disk; None when there is none."""
    support = ENCODINGS.get(encoding)
    if support is None and (found := re.fullmatch("([1-9][0-9]?):([1-9][0-9]?)", encoding, re.ASCII)):
        n, m = int(found[1]), int(found[2])
        support = NOfM(n, m) if n < m <= MOST else None
    if support is None and (found := re.fullmatch(f"{NAME}:(0|[1-9][0-9]?)", encoding, re.ASCII)):
        support = EliasFano(int(found[1])) if int(found[1]) <= MOST_LOW else None
    return None if support is None or values not in VALUES else Coding(support, VALUES[values])


@lru_cache(maxsize=1 << 14)
def cheapest(factor: FactorSpec) -> Coding:
    """Return the coding with the fewest bytes for a factor; nothing but arithmetic."""
    return min(_codings(factor), key=lambda coding: _bytes(coding, factor))


def cheapest_bytes(factor: FactorSpec) -> int:
    """Return the bytes of the cheapest coding."""
    return int(_bytes(cheapest(factor), factor))


def measured(factor: Tensor, dtype: torch.dtype) -> FactorSpec:
    """Return what is to be known of a CPU tensor that is stored as ``dtype`` with its zeros left out.

    Its pattern is the cheapest n:m of 4, 8 and 16 neighbours, where that is cheaper than every other support.
    """
    bits = bits_of(factor.to(value_type(dtype))).reshape(-1).numpy()
    packed = np.packbits(bits != 0, bitorder="little")
    spec = FactorSpec(tuple(factor.shape), dtype, int(np.count_nonzero(bits)))
    if (spec.nonzeros or 0) < _THINNEST_MASK * spec.values:
        spec = replace(spec, skips=int((gaps_between(np.flatnonzero(bits)) // SKIP).sum()))
    patterned = [replace(spec, pattern=pattern) for pattern in _patterns(packed, spec.shape)]
    return min([spec, *patterned], key=cheapest_bytes)


def _codings(factor: FactorSpec) -> Iterator[Coding]:
    supports = list(ENCODINGS.values())
    if factor.nonzeros is not None:
        supports.append(EliasFano(best_low_bits(factor.values, factor.nonzeros)))
    if factor.pattern is not None:
        supports.append(NOfM(*factor.pattern))
    plain, *coded = VALUES.values()
    for values in (plain, *(each for each in coded if factor.dtype in CODED)):
        for support in supports:
            yield Coding(support, values)


def _bytes(coding: Coding, factor: FactorSpec) -> float:
    nbytes = coding.nbytes(factor)
    return float("inf") if nbytes is None else nbytes


def _patterns(packed: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (n, m) with n the most nonzeros of any m neighbours, for each m that divides the rows."""
    for m in _WIDTHS:
        if packed.size and shape and shape[-1] % m == 0:
            masks = packed.view("<u2") if m == 16 else packed
            there = np.flatnonzero(np.bincount(masks, minlength=1 << 16))
            halves = [there & 15, there >> 4] if m == 4 else [there]
            n = max(int((BITS_SET[half & 255] + BITS_SET[half >> 8]).max()) for half in halves)
            if 0 < n < m:
                yield n, m
