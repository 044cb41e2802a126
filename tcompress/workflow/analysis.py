"""analyze(): what each format would cost each layer, in error and in bytes, before anything is written."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tcompress.checkpoint.layers import Layer, find_layers
from tcompress.checkpoint.manifest import is_compressed
from tcompress.checkpoint.reader import Checkpoint
from tcompress.errors import NumericalError, UsageError, listed
from tcompress.formats import FORMATS, Format
from tcompress.formats.inner import INNER
from tcompress.linalg.permutation import shuffled
from tcompress.workflow.checking import check_choices, require_working_memory
from tcompress.workflow.fitting import Fitted, fit_several
from tcompress.workflow.grouping import find_groups, find_shared, fit_shared, is_joint
from tcompress.workflow.layout import added_header_bytes
from tcompress.workflow.plan import Target
from tcompress.workflow.planning import break_even, find_setting
from tcompress.workflow.progress import Progress, silent, steps
from tcompress.workflow.results import Analysis, AnalysisRow, Winner
from tcompress.workflow.settings import Settings
from tcompress.workflow.survey import facts_of

USUAL_BUDGETS = (0.5, 0.25, 0.1)
LOW_RANK, SPARSE, BOTH = "low-rank", "sparse", "low-rank + sparse"
# By name, so that a format may be missing; one that is not named here is a family of its own.
_FAMILIES = dict.fromkeys(("svd", "tt", "ttm", "tucker", "cp", "reshaped-sum"), LOW_RANK) | {
    "sparse": SPARSE,
    "low-rank-sparse": BOTH,
}


def usual_choices() -> list[Format | Target]:
    """Return what is tried unasked: every quick format at a few fractions of the dense bytes."""
    quick = [format_type for format_type in FORMATS.values() if format_type.quick]
    return [Target(format_type, keep=keep) for format_type in quick for keep in USUAL_BUDGETS]


def analyze(
    checkpoint: Checkpoint,
    choices: Sequence[Format | Target] | None = None,
    *,
    layers: Sequence[str] = (),
    structure: bool = False,
    settings: Settings | None = None,
    progress: Progress = silent,
) -> Analysis:
    """Fit every choice to every layer that matches one of the globs (all without any) and weigh what comes out.

    structure: fit the low-rank formats to the shuffled weight as well, which takes twice the time.

    Raises UsageError when no layer matches, NumericalError for NaN or Inf unless such layers may be passed over.
    """
    started = time.perf_counter()
    settings, choices = settings or Settings(), choices or usual_choices()
    if is_compressed(checkpoint):
        raise UsageError("is compressed already; decompress it first", path=checkpoint.path)
    found = find_layers(checkpoint)
    chosen = [layer for layer in found if not layers or any(fnmatch.fnmatchcase(layer.name, glob) for glob in layers)]
    if not chosen:
        known = listed([layer.name for layer in found]) or "none"
        raise UsageError(f"no layer matches {', '.join(layers) or '*'}; there are {known}", path=checkpoint.path)
    check_choices([(layer, choice) for layer in chosen for choice in choices], settings)
    require_working_memory(checkpoint, chosen)
    joint = _joint_rows(checkpoint, chosen, [choice for choice in choices if is_joint(choice)], settings)
    rows: list[AnalysisRow] = []
    limits: dict[str, dict[str, Format | None]] = {}
    for layer in steps("analyzing", chosen, progress):
        weight = checkpoint.read(layer.name)
        types = dict.fromkeys(_type(choice) for choice in choices if not is_joint(choice))
        limits[layer.name] = {t.name: break_even(t, layer, settings.stored_type(layer)) for t in types}
        own = _rows(
            checkpoint,
            layer,
            weight,
            [choice for choice in choices if not is_joint(choice)],
            limits[layer.name],
            settings,
        )
        if structure:
            own = list(_with_structure(weight, own, settings.stored_type(layer), settings))
        by_choice = {row.asked: row for row in (*own, *joint.get(layer.name, []))}
        rows += [by_choice[str(choice)] for choice in choices]
    asked, seconds = tuple(str(choice) for choice in choices), time.perf_counter() - started
    return Analysis(checkpoint.path, asked, tuple(rows), limits, seconds, best=tuple(winners(choices, rows)))


def winners(choices: Sequence[Format | Target], rows: Sequence[AnalysisRow]) -> Iterator[Winner]:
    """Yield the best row of each layer at each ``keep`` at which several families were tried; ties go by bytes.

    A layer that nothing fits at that ``keep`` has none.
    """
    families: dict[float, dict[str, str]] = {}
    for choice in choices:
        if isinstance(choice, Target) and choice.keep is not None:
            family = _FAMILIES.get(choice.format.name, choice.format.name)
            families.setdefault(choice.keep, {})[str(choice)] = family
    compared = {keep: asked for keep, asked in families.items() if len(set(asked.values())) > 1}
    own: dict[Layer, list[AnalysisRow]] = {}
    for row in rows:
        own.setdefault(row.layer, []).append(row)
    for layer, tried in own.items():
        for keep, asked in compared.items():
            fitting = [row for row in tried if row.asked in asked and row.worthwhile]
            if fitting:
                best = min(fitting, key=lambda row: (row.relative_error, row.stored_bytes))
                yield Winner(layer, keep, asked[best.asked], best)


def _rows(
    checkpoint: Checkpoint,
    layer: Layer,
    weight: Tensor,
    choices: Sequence[Format | Target],
    limits: Mapping[str, Format | None],
    settings: Settings,
) -> list[AnalysisRow]:
    reason = facts_of(weight).flaw
    if reason is not None:
        if not settings.allow_nonfinite:
            way_out = "--allow-nonfinite passes over such layers"
            raise NumericalError(f"{reason}; {way_out}", path=checkpoint.path, tensor=layer.name)
        return [_unfit(layer, choice, reason) for choice in choices]
    found = [_found(weight, layer, choice, settings) for choice in choices]
    fitted = dict(_fit_by_type(weight, [s for s in found if isinstance(s, Format)], layer, settings))
    rows = []
    for choice, setting in zip(choices, found, strict=True):
        result = setting if isinstance(setting, str) else fitted[setting]
        if isinstance(result, str):
            rows.append(_unfit(layer, choice, result))
        else:
            rows.append(_row(layer, choice, result, limits[result.format.name]))
    return rows


def _joint_rows(
    checkpoint: Checkpoint, layers: Sequence[Layer], choices: Sequence[Format | Target], settings: Settings
) -> dict[str, list[AnalysisRow]]:
    """Return the rows of formats that fit several layers as one, by layer."""
    rows: dict[str, list[AnalysisRow]] = {layer.name: [] for layer in layers}
    for choice in choices:
        sound = [layer for layer in layers if not facts_of(checkpoint.read(layer.name)).nonfinite]
        for layer in layers:
            if layer not in sound:
                rows[layer.name].append(_unfit(layer, choice, "holds values that are NaN or Inf"))
        for group in find_groups([(layer, choice, None) for layer in sound]):
            store = settings.stored_type(group.layers[0])
            found = find_shared(checkpoint, group, store, settings.device)
            if isinstance(found, str):
                for layer in group.layers:
                    rows[layer.name].append(_unfit(layer, choice, found))
                continue
            for layer, each in zip(found.layers, fit_shared(checkpoint, found, store, settings.device)[1], strict=True):
                stored = found.bytes_of(layer)
                verdict = f"saves {1 - (found.stored_bytes + found.header_bytes) / group.dense_bytes:.0%}"
                rows[layer.name].append(
                    AnalysisRow(
                        layer,
                        str(choice),
                        each.format,
                        stored,
                        each.relative_error,
                        each.seconds,
                        verdict,
                        worthwhile=True,
                    )
                )
    return rows


def _with_structure(
    weight: Tensor, rows: Sequence[AnalysisRow], store: torch.dtype, settings: Settings
) -> Iterator[AnalysisRow]:
    """Add to each row of a low-rank format what its error gains from the order of the entries."""
    control = shuffled(weight, 0)
    fitted = {row.format: row for row in rows if row.format is not None and row.format.name in INNER}
    errors: dict[Format, float] = {}
    for kind in dict.fromkeys(type(setting) for setting in fitted):
        own = [setting for setting in fitted if type(setting) is kind]
        try:
            for each in fit_several(control, own, store=store, device=settings.device):
                errors[each.format] = each.relative_error
        except NumericalError:
            continue  # the control is a figure beside the others: without it they stand all the same
    for row in rows:
        without = None if row.format is None else errors.get(row.format)
        if without is None or row.relative_error is None:
            yield row
        else:
            yield replace(row, structure=without - row.relative_error)


def _unfit(layer: Layer, choice: Format | Target, reason: str) -> AnalysisRow:
    return AnalysisRow(layer, str(choice), None, None, None, 0.0, f"keep dense: {reason}", worthwhile=False)


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
        layer,
        str(choice),
        fitted.format,
        stored,
        fitted.relative_error,
        fitted.seconds,
        verdict,
        worthwhile,
        notes=fitted.format.notes(layer.shape),
    )


def _type(choice: Format | Target) -> type[Format]:
    return choice.format if isinstance(choice, Target) else type(choice)
