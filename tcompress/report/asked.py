"""An asked setting, taken apart: what is fitted, and how much of it."""

from __future__ import annotations

from tcompress.formats import FORMATS

_BUDGETS = ("keep", "tolerance", "ranks")


def split_asked(asked: str) -> tuple[str, str]:
    """Split ``svd:seed=0:keep=0.5`` into ``svd`` and ``keep=0.5``; options at their defaults are left out."""
    name, *options = asked.split(":")
    defaults, size = FORMATS[name].option_defaults(), FORMATS[name].size_option
    amounts, others = [], [name]
    for option in options:
        key, _, value = option.partition("=")
        if key in (*_BUDGETS, size):
            amounts.append(option)
        elif str(defaults.get(key)) != value:
            others.append(option)
    return ":".join(others), ":".join(amounts)
