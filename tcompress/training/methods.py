"""The table of all methods: one line each."""

from __future__ import annotations

import dataclasses
from typing import Any

from tcompress.errors import UsageError
from tcompress.training.distillation import Distill
from tcompress.training.finetuning import Finetune
from tcompress.training.objective import Method

METHODS: dict[str, type[Method]] = {method.name: method for method in (Finetune, Distill)}


def make_method(name: str, **options: Any) -> Method:
    """Return a method with those of its options that are not None.

    Raises UsageError for a method that there is not, and for options that it does not have.
    """
    if name not in METHODS:
        raise UsageError(f"--method: {name!r} is none of {', '.join(METHODS)}")
    given = {option: value for option, value in options.items() if value is not None}
    foreign = sorted(set(given) - {field.name for field in dataclasses.fields(METHODS[name])})
    if foreign:
        raise UsageError(f"--method {name} has no --{foreign[0].replace('_', '-')}")
    return METHODS[name](**given)
