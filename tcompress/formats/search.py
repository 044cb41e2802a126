"""Search for the smallest size within an error, for formats whose error no formula tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from tcompress.formats.base import Format
from tcompress.linalg.distance import compare

AnyFormat = TypeVar("AnyFormat", bound=Format)


def smallest_reaching(
    weight: Tensor, relative_error: float, setting: Callable[[int], AnyFormat], most: int
) -> AnyFormat:
    """Return the setting of the smallest size found, 1..most, whose fit is within the error; ``most`` if none is."""

    def reaches(size: int) -> bool:
        return compare(weight, setting(size).fit(weight).reconstruct().detach())[1] <= relative_error

    return setting(smallest_within(reaches, most))


def smallest_within(reaches: Callable[[int], bool], most: int) -> int:
    """Return the smallest size found at which ``reaches`` is true; ``most`` is taken to be.

    Doubling first, because large sizes cost most to fit, then bisection. One size less has been tried, and failed;
    where a fit is not the best possible, a still smaller size might yet do.
    """
    failed, size = 0, 1
    while size < most and not reaches(size):
        failed, size = size, min(2 * size, most)
    while size - failed > 1:
        middle = (failed + size) // 2
        if reaches(middle):
            size = middle
        else:
            failed = middle
    return size
