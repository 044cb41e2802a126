"""Factors that stay as they are stored: unpacked bit by bit, cast without their codes, copied and moved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tcompress.encodings import ENCODINGS, find
from tcompress.errors import FormatError
from tcompress.runtime.packed import (
    Packed,
    assemble,
    held_values,
    in_type,
    stored_in,
    weight_of,
)
from tests.runtime.factored import KERNEL, MATRIX, STORES, TEXTS, stored

every_format = pytest.mark.parametrize("name", TEXTS)
every_store = pytest.mark.parametrize("store", STORES)
every_shape = pytest.mark.parametrize("shape", [MATRIX, KERNEL], ids=["matrix", "kernel"])


def factors_of(name, store, shape=MATRIX, dtype=torch.float32):
    of = stored(name, shape, store)
    return of, assemble(of.setting, of.shape, of.held(), dtype)


@every_shape
@every_store
@every_format
def test_what_is_assembled_is_the_weight_that_decompression_gives(name, store, shape):
    of, factors = factors_of(name, store, shape)
    with torch.no_grad():
        assert torch.equal(weight_of(factors, torch.float32), of.weight())
    assert torch.equal(weight_of(factors, torch.float32), of.weight())
    assert factors.shape == shape
    values = {key: factor.values for key, factor in of.factors.items()}
    found = dict(held_values(factors, tuple(stored_in(factors))))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key].float(), held.float()) for key, held in values.items())


@every_store
@every_format
def test_what_is_held_is_what_was_given(name, store):
    of = stored(name, MATRIX, store)
    held = of.held()
    factors = assemble(of.setting, of.shape, held, torch.float32)
    assert stored_in(factors).keys() == held.keys()
    assert all(stored_in(factors)[key] is each for key, each in held.items())
    held = [*factors.parameters(), *factors.buffers()]
    assert sum(tensor.nbytes for tensor in held) == sum(factor.nbytes for factor in of.factors.values())


@every_format
def test_state_dicts_name_factors_as_the_format_does(name):
    of, factors = factors_of(name, "int8")
    names = {f"{key}.{part}" if part else key for key, factor in of.factors.items() for part in factor.parts}
    assert factors.state_dict().keys() == names


@every_store
@every_format
def test_casts_leave_codes_and_scales_in_their_types(name, store):
    _, factors = factors_of(name, store)
    before = {key: buffer.dtype for key, buffer in factors.named_buffers()}
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        factors.to(dtype)
        assert {key: buffer.dtype for key, buffer in factors.named_buffers()} == before
        assert all(parameter.dtype == dtype for parameter in factors.parameters())
    untouched = factors_of(name, store)[1]
    assert all(torch.equal(one, two) for one, two in zip(factors.buffers(), untouched.buffers(), strict=True))
    assert weight_of(factors, torch.float32).shape == MATRIX


@every_store
@every_format
def test_gradients_are_cast_with_the_values(name, store):
    _, factors = factors_of(name, store)
    weight = weight_of(factors, torch.float32)
    if not weight.requires_grad:
        return
    weight.sum().backward()
    factors.to(torch.float64)
    assert all(held.grad is None or held.grad.dtype == held.dtype == torch.float64 for held in factors.parameters())
    assert any(held.grad is not None for held in factors.parameters())


@every_store
@every_format
def test_factors_in_another_type_are_for_reading_alone(name, store):
    of, factors = factors_of(name, store)
    for dtype in (torch.float32, torch.bfloat16):
        found = in_type(factors, of.setting, dtype)
        assert all(held.dtype == dtype for held in found.parameters())
        assert found is factors or not any(held.requires_grad for held in found.parameters())


@pytest.mark.parametrize("encoding", sorted({each for each in ENCODINGS if each != "dense"}))
@pytest.mark.parametrize("way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_every_encoding_is_unpacked_with_its_gradient_and_copied(encoding, way):
    coding = next(each for key, each in codings() if key == encoding)
    pattern = encoding.split(":") if ":" in encoding else ("1", "4")
    matrix = torch.zeros(6, 4 * int(pattern[1]))
    matrix[:, :: int(pattern[1])] = torch.arange(1.0, 25.0).reshape(6, 4)
    parts = coding.encode(matrix)
    packed = Packed(coding, {name: part.clone() for name, part in parts.items()}, tuple(matrix.shape))
    assert torch.equal(packed(), matrix)
    with torch.no_grad():
        assert torch.equal(packed(), matrix)
    (packed() * 2).sum().backward()
    (values,) = packed.parameters()
    assert torch.equal(values.grad, torch.full_like(values, 2) * (values != 0))
    assert torch.equal(way(packed)(), matrix)
    assert packed.to("meta")().shape == matrix.shape


def codings():
    return [(name, find(name, None)) for name in ENCODINGS]


@every_store
@every_format
def test_copies_share_nothing(name, store):
    of, factors = factors_of(name, store)
    for found in (copy.deepcopy(factors), pickle.loads(pickle.dumps(factors))):
        mine = {held.data_ptr() for held in (*factors.parameters(), *factors.buffers())}
        assert not mine & {held.data_ptr() for held in (*found.parameters(), *found.buffers())}
        with torch.no_grad():
            assert torch.equal(weight_of(found, torch.float32), of.weight())


@every_store
def test_factors_that_do_not_make_the_shape_are_refused(store):
    of = stored("svd", MATRIX, store)
    with pytest.raises(FormatError, match="svd: factors"):
        assemble(of.setting, (47, 40), of.held(), torch.float32)
    held = of.held()
    held["more"] = nn.Parameter(torch.zeros(3))
    with pytest.raises(FormatError, match="svd: has factors"):
        assemble(of.setting, MATRIX, held, torch.float32)


@every_format
def test_factors_of_float64_weights_are_multiplied_in_float64(name):
    of = stored(name, MATRIX, "own", torch.float64)
    factors = assemble(of.setting, of.shape, of.held(), torch.float64)
    with torch.no_grad():
        assert torch.equal(weight_of(factors, torch.float64), of.weight(torch.float64))
