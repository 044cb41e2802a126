"""Factors of every kind, for the tests of how they are stored."""

from __future__ import annotations

from functools import lru_cache

import torch

from tcompress.encodings import FactorSpec, find, measured

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CODED = {"int8": torch.int8, "int4": torch.int4, "int3": torch.int3}
SHAPES = {
    "square": (16, 16),
    "wide": (5, 40),
    "tall": (40, 5),
    "one row": (1, 33),
    "one column": (33, 1),
    "prime": (13, 17),
    "one value": (1, 1),
    "no rows": (0, 4),
    "no columns": (4, 0),
    "65536 columns": (1, 65536),
    "65537 columns": (1, 65537),
}
DENSITIES = (0.0, None, 0.05, 0.5, 1.0)  # None: a single value
NAMES = ("dense", "bitmask", "elias-fano:0", "elias-fano:3", "delta8", "csr", "4:5", "2:4", "4:8", "15:16")


def is_pattern(name):
    """Whether a coding keeps n of every m neighbours, as its name says."""
    return name[:1].isdigit()


def bits(tensor):
    return tensor.contiguous().view(INTEGERS[tensor.dtype.itemsize])


def chosen(shape, density, generator):
    if density is None:
        found = torch.zeros(shape, dtype=torch.bool)
        found.view(-1)[-1:] = True
        return found
    return torch.rand(shape, generator=generator, dtype=torch.float64) < density


@lru_cache(maxsize=256)
def random_bits(shape, dtype, density, seed=0):
    """Random bits, so that every kind of NaN, infinity and denormal occurs, zero but for a part of them."""
    generator = torch.Generator().manual_seed(seed)
    integer = INTEGERS[dtype.itemsize]
    limits = torch.iinfo(integer)
    values = torch.randint(limits.min, limits.max, shape, generator=generator, dtype=integer)
    values[values == 0] = 1
    return torch.where(chosen(shape, density, generator), values, torch.zeros_like(values)).view(dtype)


def numbers(shape, density, seed=0):
    """Normal numbers in rows of different sizes, zero but for a part of them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator))
    values = sizes * torch.randn(shape, generator=generator)
    return torch.where(chosen(shape, density, generator), values, torch.zeros(()))


def spec_of(factor, dtype, name):
    """What there is to know of a factor, with the pattern that a name n:m asks for."""
    known = measured(factor, dtype)
    pattern = tuple(map(int, name.split(":"))) if is_pattern(name) else None
    skips = int((torch.from_numpy(gaps(factor)) // 255).sum())
    return FactorSpec(known.shape, dtype, known.nonzeros, skips, pattern)


def gaps(factor):
    found = bits(factor).reshape(-1).nonzero().reshape(-1)
    return found.diff(prepend=torch.tensor([-1])).sub(1).numpy()


def holds(factor, name):
    """Whether a factor has the pattern n:m; any factor has where there is none in the name."""
    if not is_pattern(name):
        return name != "csr" or factor.ndim == 2
    n, m = map(int, name.split(":"))
    if factor.shape[-1] % m:
        return False
    groups = (bits(factor) != 0).reshape(-1, m).sum(dim=1)
    return not len(groups) or int(groups.max()) <= n


def thinned(factor, name):
    """The factor with all but the first n values of each group cleared, where its rows have groups."""
    n, m = map(int, name.split(":"))
    if factor.shape[-1] % m:
        return factor
    groups = factor.reshape(-1, m)
    kept = (bits(groups) != 0).cumsum(dim=1) <= n
    return torch.where(kept, groups, torch.zeros((), dtype=factor.dtype)).reshape(factor.shape)


def coding_of(name, values=None):
    coding = find(name, values)
    assert coding is not None
    return coding
