"""balanced_modes against a search over every split there is."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcompress.linalg.folding import balanced_modes


def every_split(size: int, count: int, least: int = 1) -> Iterator[tuple[int, ...]]:
    if count == 1:
        if size >= least:
            yield (size,)
        return
    for first in range(least, size + 1):
        if size % first == 0:
            for rest in every_split(size // first, count - 1, first):
                yield (first, *rest)


def imbalance(modes: tuple[int, ...]) -> float:
    return sum(modes) / len(modes) / math.prod(modes) ** (1 / len(modes))


def overhead(modes: tuple[int, ...], size: int) -> float:
    return math.prod(modes) / size * imbalance(modes)


@given(st.integers(1, 150), st.integers(1, 4))
@settings(deadline=None, max_examples=60)
def test_no_other_split_costs_less(size, count):
    chosen = balanced_modes(size, count)
    exact = min(every_split(size, count), key=imbalance)
    if imbalance(exact) <= 1.25:
        assert math.prod(chosen) == size
        assert imbalance(chosen) == pytest.approx(imbalance(exact))
        return
    best = min(overhead(modes, size) for padded in range(size, 2 * size + 1) for modes in every_split(padded, count))
    # Of two modes the best are found; of more, the rest of a split is chosen for itself.
    assert overhead(chosen, size) <= best * (1 if count <= 2 else 1.06) + 1e-9


@given(st.integers(1, 60000), st.integers(2, 4))
@settings(deadline=None, max_examples=40)
def test_modes_ascend_and_hold_the_size_in_less_than_twice_its_room(size, count):
    modes = balanced_modes(size, count)
    assert len(modes) == count
    assert tuple(sorted(modes)) == modes
    assert size <= math.prod(modes) < 2 * size or size == math.prod(modes) == 1


@pytest.mark.parametrize(
    ("size", "count", "modes"),
    [
        (4096, 2, (64, 64)),
        (4096, 6, (4, 4, 4, 4, 4, 4)),
        (1024, 5, (4, 4, 4, 4, 4)),
        (768, 3, (8, 8, 12)),
        (25088, 2, (128, 196)),
        (31, 2, (4, 8)),
        (30522, 2, (165, 185)),
        (1, 3, (1, 1, 1)),
        (7, 1, (7,)),
    ],
)
def test_known_sizes_split_as_known(size, count, modes):
    assert balanced_modes(size, count) == modes


@pytest.mark.parametrize("prime", [50257, 151_909, 30_529, 999_983])
def test_a_large_prime_is_padded_by_little(prime):
    modes = balanced_modes(prime, 2)
    assert math.prod(modes) - prime < 0.02 * prime
    assert max(modes) < 1.5 * min(modes)
