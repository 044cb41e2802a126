"""Running through the factors: the same as the dense operation, by as many multiplications as are announced."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tcompress.errors import NumericalError
from tcompress.formats.cp import CP
from tcompress.formats.joint import Joint
from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.shuffled import Shuffled
from tcompress.formats.sparse_product import SparseProduct
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker

DENSE = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
SETTINGS = {
    "svd": SVD(rank=2),
    "spatial svd": SVD(rank=2, matricisation="spatial"),
    "tt": TT(rank=2),
    "ttm": TTMatrix(rank=1),
    "tucker": Tucker(rank=2),
    "cp": CP(rank=2),
    "reshaped-sum": ReshapedSum(rank=1),
    "joint": Joint(rank=2),
}
everything = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def tensor_of(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def multiplications(operation):
    """What torch counts on the way; vectors multiplied entry by entry are not counted."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        operation()
    return counter.get_total_flops() // 2


# ------------------------------------------------------------------------------------------------ the same values

GEOMETRIES = {
    "1d": ((12, 6, 5), {"stride": 3, "padding": 1, "dilation": 2}),
    "2d of all numbers": ((16, 8, 3, 3), {"stride": 2, "padding": 2, "dilation": 3}),
    "2d not square": ((16, 8, 3, 5), {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)}),
    "2d not square the other way": ((16, 8, 5, 2), {"stride": (1, 3), "padding": (4, 0), "dilation": (2, 1)}),
    "2d same": ((16, 8, 4, 3), {"padding": "same", "dilation": (2, 1)}),
    "2d valid": ((16, 8, 3, 3), {"padding": "valid", "stride": 2}),
    "3d": ((16, 8, 3, 1, 2), {"stride": (1, 2, 1), "padding": (2, 0, 1), "dilation": (2, 1, 1)}),
    "two groups": ((16, 8, 3, 3), {"groups": 2, "padding": (1, 0), "stride": (1, 2)}),
    "two groups 1d": ((12, 6, 5), {"groups": 2, "padding": "same"}),
    "two groups 3d": ((16, 8, 2, 2, 2), {"groups": 2, "dilation": 2}),
    "depthwise": ((24, 1, 5, 5), {"groups": 24, "padding": 2, "stride": (2, 1)}),
    "depthwise with two outputs each": ((24, 1, 3, 3), {"groups": 12, "dilation": (1, 3)}),
    "pointwise": ((32, 24, 1, 1), {"stride": 2}),
}


@everything
@pytest.mark.parametrize(("shape", "geometry"), GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_the_convolution_is_the_dense_one(setting, shape, geometry):
    found = setting.fit(tensor_of(*shape))
    x = tensor_of(3, shape[1] * geometry.get("groups", 1), *(13, 11, 12)[: len(shape) - 2], seed=1)
    torch.testing.assert_close(found.conv(x, **geometry), DENSE[len(shape)](x, found.reconstruct(), **geometry))


@everything
def test_geometry_may_come_as_lists(setting):
    found, x = setting.fit(tensor_of(16, 8, 3, 3)), tensor_of(2, 8, 9, 9, seed=1)
    geometry = {"stride": [2, 1], "padding": [0, 1], "dilation": [1, 2]}
    torch.testing.assert_close(found.conv(x, **geometry), F.conv2d(x, found.reconstruct(), **geometry))


every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


@every_setting
def test_one_number_in_a_list_is_for_all_sizes(setting):
    found, x = setting.fit(tensor_of(16, 8, 3, 3)), tensor_of(2, 8, 9, 9, seed=1)
    geometry = {"stride": (2,), "padding": (1,)}
    torch.testing.assert_close(found.conv(x, **geometry), F.conv2d(x, found.reconstruct(), **geometry))


@everything
@pytest.mark.parametrize("shape", [(24, 20), (31, 37), (1, 40), (40, 1), (48, 64)], ids=str)
def test_linear_is_the_dense_one_for_inputs_of_any_order(setting, shape):
    found = setting.fit(tensor_of(*shape))
    for leading in ((), (1,), (5,), (2, 3, 4)):
        x = tensor_of(*leading, shape[1], seed=1)
        torch.testing.assert_close(found.linear(x), F.linear(x, found.reconstruct()))
    x = tensor_of(shape[1], 5, seed=1).T
    torch.testing.assert_close(found.linear(x), F.linear(x, found.reconstruct()))


@every_setting
def test_linear_of_no_inputs_is_no_outputs(setting):
    found = setting.fit(tensor_of(48, 64))
    assert found.saves()
    assert found.linear(torch.zeros(0, 64, dtype=torch.float64)).shape == (0, 48)
    assert found.linear(torch.zeros(2, 0, 64, dtype=torch.float64)).shape == (2, 0, 48)


@every_setting
def test_a_convolution_of_no_inputs_is_no_outputs(setting):
    found = setting.fit(tensor_of(32, 16, 3, 3))
    assert found.saves()
    assert found.conv(torch.zeros(0, 16, 9, 9, dtype=torch.float64)).shape == (0, 32, 7, 7)


# ------------------------------------------------------------------------------------------------- the embedding


@everything
@pytest.mark.parametrize("ids", [[[0, 49, 7], [7, 7, 1]], [49], [], [[], []], [3] * 500], ids=str)
def test_rows_of_an_embedding_are_those_of_the_table(setting, ids):
    found = setting.fit(tensor_of(50, 12))
    chosen = torch.tensor(ids, dtype=torch.int64)
    torch.testing.assert_close(found.embedding(chosen), F.embedding(chosen, found.reconstruct()))
    torch.testing.assert_close(found.embedding(chosen.int()), F.embedding(chosen, found.reconstruct()))


@everything
@pytest.mark.parametrize("name", [-1, 1000])
def test_an_id_outside_of_the_table_raises(setting, name):
    with pytest.raises(IndexError):
        setting.fit(tensor_of(31, 37)).embedding(torch.tensor([0, name]))


@every_setting
def test_an_id_in_the_padding_raises_as_any_other_outside(setting):
    with pytest.raises(IndexError):
        setting.fit(tensor_of(31, 37)).embedding(torch.tensor([31]))


# --------------------------------------------------------------------------------------------- the multiplications

BY_HAND_LINEAR = {  # of a (48, 40) weight
    "svd": (SVD(rank=3), 3 * 40 + 48 * 3),
    "tt": (TT(ranks=(2, 5, 2), out_modes=(6, 8), in_modes=(5, 8)), 5 * 40 + 48 * 5),
    "ttm": (  # 40 inputs: 8 x (5 -> 6 x 2), then 6 x (2 x 8 -> 8)
        TTMatrix(rank=2, out_modes=(6, 8), in_modes=(5, 8)),
        8 * 5 * 6 * 2 + 6 * (2 * 8) * 8,
    ),
    "tucker": (Tucker(ranks=(2, 2, 3, 1), out_modes=(6, 8), in_modes=(5, 8)), 3 * 40 + 4 * 3 + 48 * 4),
    "cp": (  # two pairs and one component: 8 x (5 -> 6), then 6 x (8 -> 8)
        CP(rank=1, out_modes=(6, 8), in_modes=(5, 8)),
        8 * 5 * 6 + 6 * 8 * 8,
    ),
    "reshaped-sum": (
        ReshapedSum(ranks=(3, 1), out_modes=(6, 8), in_modes=(5, 8)),
        3 * 40 + 48 * 3 + 8 * 5 * 6 + 6 * 8 * 8,
    ),
    "joint": (Joint(ranks=(1, 4, 4)), 4 * 40 + 4 * 4 + 48 * 4),
}


@pytest.mark.parametrize(("setting", "expected"), BY_HAND_LINEAR.values(), ids=BY_HAND_LINEAR.keys())
def test_a_linear_layer_takes_the_multiplications_counted_by_hand(setting, expected):
    found = setting.fit(tensor_of(48, 40))
    assert found.operations() == expected
    assert found.saves()
    one, two = (multiplications(lambda n=n: found.linear(tensor_of(n, 40))) for n in (1, 2))
    assert two - one == expected  # the difference, because factors may be multiplied out once


BY_HAND_CONV = {  # of a (64, 32, 3, 3) weight: stride 1, then stride 2, where four inputs stand for one output
    "svd": (SVD(rank=4), 4 * 32 * 9 + 64 * 4, 4 * 32 * 9 + 64 * 4),
    "spatial svd": (SVD(rank=4, matricisation="spatial"), 4 * 32 * 3 + 64 * 3 * 4, None),
    "tt": (
        TT(ranks=(2, 4, 6, 3), out_modes=(8, 8), in_modes=(4, 8)),
        6 * 32 + 4 * 6 * 9 + 64 * 4,
        4 * 6 * 32 + 4 * 6 * 9 + 64 * 4,
    ),
    "ttm": (  # 8 x (4 -> 8 x 2), 8 x (2 x 8 -> 8 x 3), then 64 kernels of 3 x 9
        TTMatrix(ranks=(2, 3), out_modes=(8, 8), in_modes=(4, 8)),
        8 * 4 * 8 * 2 + 8 * (2 * 8) * 8 * 3 + 64 * 3 * 9,
        4 * (8 * 4 * 8 * 2 + 8 * (2 * 8) * 8 * 3) + 64 * 3 * 9,
    ),
    "tucker": (Tucker(ranks=(5, 6)), 6 * 32 + 5 * 6 * 9 + 64 * 5, 4 * 6 * 32 + 5 * 6 * 9 + 64 * 5),
    "cp": (CP(rank=7), 7 * 32 + 7 * 9 + 64 * 7, 4 * 7 * 32 + 7 * 9 + 64 * 7),
    "reshaped-sum": (ReshapedSum(ranks=(2, 1)), 2 * 32 * 9 + 64 * 2 + 32 * 3 + 64 * 3, None),
    "joint": (Joint(ranks=(1, 5, 6)), 6 * 32 + 5 * 6 * 9 + 64 * 5, 4 * 6 * 32 + 5 * 6 * 9 + 64 * 5),
}


@pytest.mark.parametrize(("setting", "plain", "strided"), BY_HAND_CONV.values(), ids=BY_HAND_CONV.keys())
def test_a_convolution_takes_the_multiplications_counted_by_hand(setting, plain, strided):
    found = setting.fit(tensor_of(64, 32, 3, 3, dtype=torch.float32))
    for stride, expected, steps in ((1, plain, 1), (2, strided, 4)):
        geometry = {"stride": stride, "padding": 1}
        assert found.saves(**geometry)
        one, two = (multiplications(partial(found.conv, torch.zeros(n, 32, 8, 8), **geometry)) for n in (1, 2))
        outputs = 64 // steps
        if expected is None:  # the spatial pair announces more than it takes: its stride acts in two places
            assert (two - one) / outputs < found.operations(steps=steps) < 9 * 64 * 32
            continue
        assert found.operations(steps=steps) == expected
        assert (two - one) / outputs == expected


def test_groups_count_once_each():
    found = Tucker(ranks=(5, 6)).fit(tensor_of(64, 32, 3, 3, dtype=torch.float32))
    expected = 2 * (6 * 32 + 5 * 6 * 9) + 64 * 5
    assert found.operations(groups=2) == expected
    x = [torch.zeros(n, 64, 8, 8) for n in (1, 2)]
    one, two = (multiplications(lambda each=each: found.conv(each, padding=1, groups=2)) for each in x)
    assert (two - one) / 64 == expected


FULL = {
    "svd": SVD(rank=32),
    "spatial svd": SVD(rank=96, matricisation="spatial"),
    "tt": TT(rank=288),
    "ttm": TTMatrix(rank=64),
    "tucker": Tucker(rank=64),
    "cp": CP(rank=288),
    "reshaped-sum": ReshapedSum(rank=32),
    "joint": Joint(rank=64),
    "shuffled": Shuffled(rank=1),
}


@pytest.mark.parametrize("setting", FULL.values(), ids=FULL.keys())
def test_where_the_factors_cost_more_the_dense_weight_is_taken(setting):
    shape = (32, 32, 3, 3)
    found = setting.fit(tensor_of(*shape, dtype=torch.float32))
    assert not found.saves()
    one, two = (multiplications(lambda n=n: found.conv(torch.zeros(n, 32, 8, 8), padding=1)) for n in (1, 2))
    assert two - one == 64 * math.prod(shape)


@pytest.mark.parametrize("setting", FULL.values(), ids=FULL.keys())
def test_where_the_factors_of_a_matrix_cost_more_the_dense_weight_is_taken(setting):
    found = setting.fit(tensor_of(32, 32))
    assert not found.saves()
    one, two = (multiplications(partial(found.linear, tensor_of(n, 32))) for n in (1, 2))
    assert two - one == 32 * 32


def test_a_stride_can_make_the_dense_weight_the_cheaper_one():
    found = Tucker(ranks=(2, 15)).fit(tensor_of(16, 32, 3, 3))
    assert found.saves(stride=1)
    assert not found.saves(stride=3)
    assert not found.saves(stride=(3, 3))


def test_a_sparse_product_multiplies_by_its_nonzeros_without_gradients():
    found = SparseProduct(nonzeros=1).fit(tensor_of(24, 20))
    assert found.saves()
    assert found.operations() == sum(int((factor != 0).sum()) for factor in found.factors)


def test_a_sparse_product_runs_through_its_factors_in_silence():
    script = (
        "import warnings; warnings.simplefilter('error'); import torch\n"
        "from tcompress.formats.sparse_product import SparseProduct\n"
        "with torch.no_grad(): SparseProduct(nonzeros=1).fit(torch.eye(24)).linear(torch.ones(3, 24))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_a_sparse_product_through_its_factors_is_the_dense_operation():
    found = SparseProduct(nonzeros=1).fit(tensor_of(24, 20))
    assert found.saves()
    with torch.no_grad():
        for leading in ((), (0,), (5,), (2, 3)):
            x = tensor_of(*leading, 20, seed=1)
            torch.testing.assert_close(found.linear(x), F.linear(x, found.reconstruct()))


# -------------------------------------------------------------------------------------- types of weights and factors


@everything
@pytest.mark.parametrize("shape", [(24, 20), (31, 37), (16, 8, 3, 3)], ids=str)
def test_weights_of_double_precision_stay_so(setting, shape):
    weight = tensor_of(*shape)
    found = setting.fit(weight)
    assert {factor.dtype for factor in found.parameters()} == {torch.float64}
    assert found.reconstruct().dtype == torch.float64


@everything
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(24, 20), (31, 37), (16, 8, 3, 3)], ids=str)
@pytest.mark.parametrize("size", [1e-4, 1.0, 100.0])
def test_factors_of_half_precision_give_nearly_the_same_weight(setting, dtype, shape, size):
    found = setting.fit(size * tensor_of(*shape, dtype=torch.float32))
    halves = {name: factor.to(dtype).float() for name, factor in found.state_dict().items()}
    rebuilt, exact = setting.load(shape, halves).reconstruct(), found.reconstruct()
    assert rebuilt.isfinite().all()
    assert (rebuilt - exact).norm() < 0.03 * exact.norm()


@every_setting
def test_a_weight_that_float16_holds_has_factors_that_it_holds(setting):
    weight = 1e3 * tensor_of(256, 256, dtype=torch.float32) + 5e3
    assert weight.half().isfinite().all()
    assert all(factor.half().isfinite().all() for factor in setting.fit(weight).parameters())


@everything
def test_weights_of_transposed_convolutions_come_back_as_any_other(setting):
    """Theirs are (in, out, *kernel): no format looks at what the two mean."""
    weight = tensor_of(8, 16, 4, 4)
    kind = type(setting)
    full = kind.within(
        (8, 16, 4, 4), torch.float64, 10**9, **{k: v for k, v in setting.options().items() if k != "rank"}
    )
    torch.testing.assert_close(full.fit(weight).reconstruct(), weight)


@everything
@pytest.mark.parametrize("size", [1e37, 1e-36])
@pytest.mark.parametrize("shape", [(9, 7), (8, 4, 3, 3)], ids=str)
def test_huge_and_tiny_weights_are_approximated_as_well_as_plain_ones(setting, size, shape):
    weight = tensor_of(*shape, dtype=torch.float32)
    plain = float((setting.fit(weight).reconstruct().detach() - weight).double().norm() / weight.double().norm())
    scaled = weight * size
    found = setting.fit(scaled).reconstruct().detach()
    assert float((found - scaled).double().norm() / scaled.double().norm()) == pytest.approx(plain, rel=1e-3, abs=1e-5)


@every_setting
def test_a_weight_too_large_for_its_factors_is_an_error_not_nan(setting):
    weight = torch.full((64, 64), 1e37)
    try:
        assert setting.fit(weight).reconstruct().isfinite().all()
    except NumericalError:
        return
