"""Unpacking by torch operations alone: the factor that decoding gives, bit by bit, eager and traced."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.encodings.factors import (
    CODED,
    DENSITIES,
    DTYPES,
    NAMES,
    SHAPES,
    bits,
    coding_of,
    holds,
    is_pattern,
    numbers,
    random_bits,
    thinned,
)

CODINGS = list(itertools.product(NAMES, (None, *CODED)))
MORE_SHAPES = {"37 values": (37,), "no values": (0,), "scalar": (), "kernel": (3, 5, 3, 16), "odd": (7, 80)}

every_name = pytest.mark.parametrize("name", NAMES)
every_coding = pytest.mark.parametrize(("name", "values"), CODINGS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()


def fitting(factor, name):
    """The factor cut down to the pattern of a name, None where the name cannot hold it."""
    if is_pattern(name):
        factor = thinned(factor, name) if factor.ndim else factor
        return factor if factor.ndim and holds(factor, name) else None
    return factor if holds(factor, name) else None


def unpacks(coding, factor):
    shape, parts = tuple(factor.shape), coding.encode(factor)
    expected, found = coding.decode(parts, shape), coding.unpack(parts, shape)
    assert (found.dtype, found.shape) == (expected.dtype, shape)
    return torch.equal(bits(found), bits(expected))


@every_name
@every_dtype
def test_values_as_they_are_come_back_bit_by_bit(name, dtype):
    for shape, density in itertools.product((SHAPES | MORE_SHAPES).values(), DENSITIES):
        factor = fitting(random_bits(shape, dtype, density), name)
        assert factor is None or unpacks(coding_of(name), factor)


@every_name
@pytest.mark.parametrize("values", CODED)
def test_codes_come_back_as_decoding_gives_them(name, values):
    for shape, density in itertools.product((SHAPES | MORE_SHAPES).values(), DENSITIES):
        factor = fitting(numbers(shape, density), name) if len(shape) > 1 else None
        assert factor is None or unpacks(coding_of(name, values), factor)


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in range(2, 17) for n in range(1, m)])
def test_every_pattern_comes_back(n, m):
    name, shape = f"{n}:{m}", (11, 7 * m)
    for values in (None, *CODED):
        assert unpacks(coding_of(name, values), thinned(numbers(shape, 0.8, seed=m), name))


def test_every_number_of_the_largest_table_stands_for_its_pattern():
    patterns = torch.tensor(list(itertools.combinations(range(16), 8)))
    factor = torch.zeros(len(patterns), 16, dtype=torch.bfloat16).scatter_(1, patterns, 1.0)
    assert unpacks(coding_of("8:16"), factor)


@every_name
@every_dtype
def test_nan_payloads_and_negative_zero_survive(name, dtype):
    quiet, signalling = bits(torch.tensor([math.nan, math.inf], dtype=dtype))
    special = torch.tensor([-0.0, 0.0, torch.finfo(dtype).tiny / 2, -math.inf, 1.0], dtype=dtype)
    factor = torch.zeros(16, 80, dtype=dtype)  # one in each group of every width
    factor[:8, 0] = torch.cat([special, torch.stack([quiet + 1, signalling + 1, -quiet]).view(dtype)])
    coding = coding_of(name)
    assert torch.equal(bits(coding.unpack(coding.encode(factor), (16, 80))), bits(factor))


@pytest.mark.parametrize("name", ["dense", "bitmask"])
def test_a_negative_scale_of_int4_makes_negative_zeros_of_stored_values_only(name):
    factor = torch.tensor([[-0.01, 7.0, 0.0, 0.01], [-7.0, 3.0, 0.0, 0.5]])
    parts = coding_of(name, "int4").encode(factor)
    parts["scale"] = -parts["scale"].abs()
    found = coding_of(name, "int4").unpack(parts, (2, 4))
    assert torch.equal(bits(found), bits(coding_of(name, "int4").decode(parts, (2, 4))))
    assert bool(torch.signbit(found[found == 0]).any())


@pytest.mark.parametrize(
    "positions", [[], [255], [254, 255], [256, 511, 1023], [1023], [510, 511, 1022], list(range(0, 1024, 256))]
)
@pytest.mark.parametrize("values", [None, *CODED])
def test_bytes_of_delta8_that_own_no_value(positions, values):
    factor = torch.zeros(4, 256)
    factor.view(-1)[positions] = torch.arange(1.0, len(positions) + 1)
    assert unpacks(coding_of("delta8", values), factor)


@settings(max_examples=150, deadline=None)
@given(
    coding=st.sampled_from([(name, values) for name, values in CODINGS if not is_pattern(name)]),
    sizes=st.lists(st.integers(0, 40), min_size=2, max_size=3),
    density=st.floats(0, 1) | st.floats(0, 0.02),
    seed=st.integers(0, 2**32),
)
def test_every_factor_comes_back(coding, sizes, density, seed):
    sizes = sizes[:2] if coding[0] == "csr" else sizes
    assert unpacks(coding_of(*coding), numbers(tuple(sizes), density, seed))


@every_name
def test_gradients_reach_the_values(name):
    factor, coding = thinned(numbers((9, 80), 0.06), "4:16"), coding_of(name)
    factor = fitting(factor, name)
    generator = torch.Generator().manual_seed(1)
    towards = torch.randn(9, 80, generator=generator)
    parts = coding.encode(factor)
    held = coding.part_names[0]
    # What encoding takes out of a factor at the places of the values is the gradient.
    positions = coding.unpack(
        {**parts, held: torch.arange(1.0, parts[held].numel() + 1).reshape(parts[held].shape)}, (9, 80)
    )
    expected = towards[positions != 0]
    values = parts[held].clone().requires_grad_()
    found = coding.unpack({**parts, held: values}, (9, 80))
    assert torch.equal(found.detach(), factor)
    (found * towards).sum().backward()
    assert torch.equal(values.grad.reshape(-1), expected)


def test_a_plain_tensor_comes_back_itself():
    values = torch.randn(3, 4, requires_grad=True)
    assert coding_of("dense").unpack({"": values}, (3, 4)) is values


def test_gradients_reach_the_scale_of_int8():
    coding = coding_of("bitmask", "int8")
    parts = coding.encode(numbers((5, 40), 0.5))
    parts["scale"].requires_grad_()
    coding.unpack(parts, (5, 40)).sum().backward()
    ones = {**parts, "scale": torch.ones(5)}
    assert torch.equal(parts["scale"].grad, coding.unpack(ones, (5, 40)).sum(dim=1))


@every_coding
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_it_compiles_without_a_graph_break_and_trains(name, values, backend):
    coding, shape = coding_of(name, values), (9, 80)
    factor = fitting(thinned(numbers(shape, 0.06), "4:16"), name)
    parts, held = coding.encode(factor), coding.part_names[0]

    def squared(parts):
        return coding.unpack(parts, shape).square()

    compiled = torch.compile(squared, backend=backend, fullgraph=True)
    assert torch.equal(bits(compiled(parts)), bits(squared(parts)))
    if values is None:
        gradients = []
        for run in (squared, compiled):
            leaf = parts[held].clone().requires_grad_()
            run({**parts, held: leaf}).sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)


class Holder(torch.nn.Module):
    """A module that keeps a factor packed."""

    def __init__(self, coding, parts, shape):
        super().__init__()
        self.coding, self.shape, self.names = coding, shape, tuple(parts)
        for number, part in enumerate(parts.values()):
            self.register_buffer(f"part{number}", part)

    def forward(self, x):
        parts = {name: getattr(self, f"part{number}") for number, name in enumerate(self.names)}
        return x @ self.coding.unpack(parts, self.shape)


@every_coding
def test_a_module_that_unpacks_is_exported(name, values):
    shape, x = (9, 80), torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    coding = coding_of(name, values)
    module = Holder(coding, coding.encode(fitting(thinned(numbers(shape, 0.06), "4:16"), name)), shape)
    exported = torch.export.export(module, (x,))
    assert torch.equal(exported.module()(x), module(x))


@every_coding
def test_the_device_of_the_parts_is_where_everything_happens(name, values):
    coding, shape = coding_of(name, values), (9, 80)
    parts = coding.encode(fitting(thinned(numbers(shape, 0.06), "4:16"), name))
    found = coding.unpack({part: tensor.to("meta") for part, tensor in parts.items()}, shape)
    assert (found.device.type, found.shape, found.dtype) == ("meta", shape, torch.float32)
