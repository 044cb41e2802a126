"""Every decomposition there is, and the way from text and JSON to one and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tcompress.errors import FormatError
from tcompress.formats.base import Factorization, Format
from tcompress.formats.cp import CP
from tcompress.formats.joint import Joint
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.options import check_options, make, split
from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.shuffled import Shuffled
from tcompress.formats.sparse import Sparse
from tcompress.formats.sparse_product import SparseProduct
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker

__all__ = ["FORMATS", "SHORT_NAMES", "Factorization", "Format", "find_format", "from_dict", "make", "parse", "to_dict"]

# The list of all formats: the command line, plans, files, analysis and tests follow from it.
FORMATS: dict[str, type[Format]] = {
    format_type.name: format_type
    for format_type in (
        SVD,
        TT,
        TTMatrix,
        Tucker,
        CP,
        ReshapedSum,
        SparseProduct,
        Sparse,
        LowRankSparse,
        Shuffled,
        Joint,
    )
}

SHORT_NAMES = {"lrs": LowRankSparse.name}  # for typing; files and plans have the full names


def find_format(name: str) -> type[Format]:
    """Return the format of that name, or short name. Raises FormatError that lists those there are."""
    name = SHORT_NAMES.get(name, name)
    if name not in FORMATS:
        raise FormatError(f"there is no format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def parse(text: str) -> tuple[type[Format], dict[str, Any]]:
    """Split ``svd:rank=16:seed=1`` into the format and its options; lists are written with commas.

    Raises FormatError for unknown formats and options.
    """
    name, options = split(text)
    format_type = find_format(name)
    check_options(format_type, options)
    return format_type, options


def to_dict(setting: Format) -> dict[str, Any]:
    """Return the format as JSON has it: its name beside the options that are not at their default."""
    return {"format": setting.name, **setting.options()}


def from_dict(document: Mapping[str, Any]) -> Format:
    """Return the format that ``to_dict`` described. Raises FormatError when it describes none."""
    options = dict(document)
    name = options.pop("format", None)
    if not isinstance(name, str):
        raise FormatError("a format needs its name under the key 'format'")
    return make(find_format(name), options)
