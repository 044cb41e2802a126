"""The C step on codes: the factors that give a weight once they are rounded, not those that give it before.

A fit that is rounded has a rounding error of its own each time it is made, also of a weight that stored factors give
exactly: a singular value decomposition finds other factors for it than those. Factors that stand already are the better
start near the end, where the weight has come to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tcompress.encodings import CODED
from tcompress.formats.base import Factorization, matrix_of
from tcompress.linalg.multilinear import refine
from tcompress.training.twin import Twin
from tcompress.workflow.fitting import stored_factors

_ROUNDS = 2  # of conjugate gradients for one factor


def project(twin: Twin, target: Tensor) -> None:
    """Give a twin the factors that its setting has for a weight, (out, in) or (out, in, *kernel).

    Of factors that are stored as codes: those of two that give the weight more nearly as they are stored, the fit of it
    or what stood there before, moved towards it. Raises NumericalError where factors cannot be stored.
    """
    fitted = twin.setting.fit(target)
    if twin.store not in CODED:
        twin.take(fitted)
        return
    moved = _moved(twin, target)
    twin.take(min((fitted, moved), key=partial(_distance, twin, target)))


def _distance(twin: Twin, target: Tensor, factors: Factorization) -> float:
    """Return the squared distance of a weight from what factors give as they are stored, which the twin then has."""
    twin.take(factors)
    return float((twin.compressed() - target).double().square().sum())


def _moved(twin: Twin, target: Tensor) -> Factorization:
    """Return the twin's factors as they are stored, each in its turn made the best beside the others and rounded.

    So each makes good what the rounding of those before it has lost. The places of sparse values stay.
    """
    stored = twin.stored()
    values = {name: factor.values.to(target) for name, factor in stored.items()}
    moment = torch.ones(matrix_of(target).shape[1], dtype=target.dtype, device=target.device)
    for name, factor in stored.items():
        module = twin.planned.load(twin.shape, values).requires_grad_(False)
        if name not in dict(module.named_parameters()):
            continue
        is_sparse = bool(factor.coding.support.part_names)
        rebuild = partial(_rebuilt, module, name)
        matrix = matrix_of(target).contiguous()
        found = refine(rebuild, [values[name]], matrix, moment, keeps_zeros=is_sparse, rounds=_ROUNDS)
        rounded = stored_factors({name: found[0].to(target.dtype)}, twin.planned, twin.shape, twin.store)
        values[name] = rounded[name].values.to(target)
    return twin.planned.load(twin.shape, values)


def _rebuilt(module: nn.Module, name: str, factors: Sequence[Tensor]) -> Tensor:
    dense: Tensor = functional_call(module, {name: factors[0]}, ("reconstruct",))
    return dense.reshape(dense.shape[0], -1)
