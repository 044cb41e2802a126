"""The table of all methods: one line each."""

from __future__ import annotations

from typing import Any

from tcompress.errors import FormatError, UsageError
from tcompress.formats.options import split
from tcompress.training.distillation import Distill
from tcompress.training.finetuning import Finetune
from tcompress.training.iterating import Iterate
from tcompress.training.learning_compression import LearningCompression
from tcompress.training.method_options import made, names_of, require_known
from tcompress.training.objective import Method
from tcompress.training.pruning import Prune
from tcompress.training.reconstruction import Reconstruct
from tcompress.training.scratch import FromScratch

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Finetune, Distill, Reconstruct, Prune, LearningCompression, Iterate, FromScratch)
}


def make_method(text: str, **options: Any) -> Method:
    """Return the method that ``distill:alpha=0.5:temperature=2`` names, with those of ``options`` that are not None.

    Raises UsageError for a method that there is not, for options that it does not have, and for senseless values.
    """
    try:
        name, said = split(text)
    except FormatError as error:
        raise UsageError(f"--method {error.reason}") from error
    if name not in METHODS:
        raise UsageError(f"--method: {name!r} is none of {', '.join(METHODS)}")
    require_known(METHODS[name], said, name)
    given = {option: value for option, value in options.items() if value is not None}
    foreign = sorted(set(given) - set(names_of(METHODS[name])))
    if foreign:
        raise UsageError(f"--method {name} has no --{foreign[0].replace('_', '-')}")
    twice = sorted(set(said) & set(given))
    if twice:
        raise UsageError(f"--method {name} says its {twice[0]} already; leave out --{twice[0].replace('_', '-')}")
    return made(METHODS[name], said | given, name)
