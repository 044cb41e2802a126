"""analyze(): what each format would cost each layer, in error and in bytes, before anything is written."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError, UsageError
from tcompress.formats import FORMATS, Format
from tcompress.workflow.fitting import Fitted, fit_several
from tcompress.workflow.layout import added_header_bytes
from tcompress.workflow.plan import Target
from tcompress.workflow.planning import Settings, break_even, find_setting
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.results import Analysis, AnalysisRow
from tcompress.workflow.survey import facts_of

USUAL_BUDGETS = (0.5, 0.25, 0.1)


def usual_choices() -> list[Format | Target]:
    """Return what is tried unasked: every quick format at a few fractions of the dense bytes."""
    quick = [format_type for format_type in FORMATS.values() if format_type.quick]
    return [Target(format_type, keep=keep) for format_type in quick for keep in USUAL_BUDGETS]


def analyze(
    checkpoint: Checkpoint,
    choices: Sequence[Format | Target] | None = None,
    *,
    layers: Sequence[str] = (),
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Analysis:
    """Fit every choice to every layer that matches one of the globs (all without any) and weigh what comes out.

    Raises UsageError when no layer matches, NumericalError for NaN or Inf unless such layers may be passed over.
    """
    started = time.perf_counter()
    settings, choices = settings or Settings(), choices or usual_choices()
    if is_compressed(checkpoint):
        raise UsageError("is compressed already; decompress it first", path=checkpoint.path)
    found = find_layers(checkpoint)
    chosen = [layer for layer in found if not layers or any(fnmatch.fnmatchcase(layer.name, glob) for glob in layers)]
    if not chosen:
        known = ", ".join(layer.name for layer in found[:5]) or "none"
        raise UsageError(f"no layer matches {', '.join(layers) or '*'}; there are {known}", path=checkpoint.path)
    rows: list[AnalysisRow] = []
    limits: dict[str, dict[str, Format | None]] = {}
    for layer in steps("analyzing", chosen, progress):
        weight = checkpoint.read(layer.name)
        types = dict.fromkeys(_type(choice) for choice in choices)
        limits[layer.name] = {t.name: break_even(t, layer, settings.stored_type(layer)) for t in types}
        rows += _rows(checkpoint, layer, weight, choices, limits[layer.name], settings)
    return Analysis(
        checkpoint.path, tuple(str(choice) for choice in choices), tuple(rows), limits, time.perf_counter() - started
    )


def _rows(
    checkpoint: Checkpoint,
    layer: Layer,
    weight: Tensor,
    choices: Sequence[Format | Target],
    limits: Mapping[str, Format | None],
    settings: Settings,
) -> list[AnalysisRow]:
    def unfit(choice: Format | Target, reason: str) -> AnalysisRow:
        return AnalysisRow(layer, str(choice), None, None, None, 0.0, f"keep dense: {reason}", worthwhile=False)

    nonfinite = facts_of(weight).nonfinite
    if nonfinite:
        reason = f"holds {nonfinite} values that are NaN or Inf"
        if not settings.allow_nonfinite:
            way_out = "--allow-nonfinite passes over such layers"
            raise NumericalError(f"{reason}; {way_out}", path=checkpoint.path, tensor=layer.name)
        return [unfit(choice, reason) for choice in choices]
    found = [_found(weight, layer, choice, settings) for choice in choices]
    fitted = dict(_fit_by_type(weight, [s for s in found if isinstance(s, Format)], layer, settings))
    rows = []
    for choice, setting in zip(choices, found, strict=True):
        result = setting if isinstance(setting, str) else fitted[setting]
        if isinstance(result, str):
            rows.append(unfit(choice, result))
        else:
            rows.append(_row(layer, choice, result, limits[result.format.name]))
    return rows


def _found(weight: Tensor, layer: Layer, choice: Format | Target, settings: Settings) -> Format | str:
    try:
        return find_setting(lambda: weight, layer, choice, settings)
    except NumericalError as error:
        return error.reason


def _fit_by_type(
    weight: Tensor, wanted: Sequence[Format], layer: Layer, settings: Settings
) -> Iterator[tuple[Format, Fitted | str]]:
    """Fit the settings of one format together: they share work."""
    for format_type in dict.fromkeys(type(setting) for setting in wanted):
        own = list(dict.fromkeys(setting for setting in wanted if type(setting) is format_type))
        store = settings.stored_type(layer)
        try:
            yield from zip(own, fit_several(weight, own, store=store, device=settings.device), strict=True)
        except NumericalError as error:
            yield from ((setting, error.reason) for setting in own)


def _row(layer: Layer, choice: Format | Target, fitted: Fitted, limit: Format | None) -> AnalysisRow:
    stored = fitted.stored_bytes
    total = stored + added_header_bytes(layer, fitted.format, fitted.specs())
    worthwhile = total < layer.dense_bytes
    if worthwhile:
        verdict = f"saves {1 - total / layer.dense_bytes:.0%}"
    else:
        size = fitted.format.size_option
        verdict = f"keep dense: larger at this {size}" + ("" if limit else f" and at any other {size}")
    return AnalysisRow(
        layer, str(choice), fitted.format, stored, fitted.relative_error, fitted.seconds, verdict, worthwhile
    )


def _type(choice: Format | Target) -> type[Format]:
    return choice.format if isinstance(choice, Target) else type(choice)
