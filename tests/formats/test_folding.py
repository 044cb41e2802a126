"""How formats fold a weight, against numpy; what pinned settings, notes and errors say of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tcompress.errors import FormatError
from tcompress.formats import FORMATS, from_dict, make, parse, to_dict
from tcompress.formats.cp import CP
from tcompress.formats.joint import Joint
from tcompress.formats.reshaped_sum import ReshapedSum
from tcompress.formats.shuffled import Shuffled
from tcompress.formats.sparse_product import SparseProduct
from tcompress.formats.svd import SVD
from tcompress.formats.tt import TT
from tcompress.formats.ttm import TTMatrix
from tcompress.formats.tucker import Tucker

FOLDED = {kind.name: kind for kind in (TT, TTMatrix, Tucker, CP)}
every_folded = pytest.mark.parametrize("kind", FOLDED.values(), ids=FOLDED.keys())


def weight_of(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ------------------------------------------------------------------------------------------------------ the fold


def test_a_matrix_is_folded_row_major_out_modes_first():
    weight = weight_of(24, 30)
    modes = {"out_modes": (4, 6), "in_modes": (5, 6)}
    plain = weight.numpy().reshape(4, 6, 5, 6)
    assert np.array_equal(TT(rank=1, **modes).folding((24, 30)).fold(weight).numpy(), plain)
    assert np.array_equal(Tucker(rank=1, **modes).folding((24, 30)).fold(weight).numpy(), plain[..., None])
    paired = plain.transpose(0, 2, 1, 3).reshape(20, 36)
    assert np.array_equal(TTMatrix(rank=1, **modes).folding((24, 30)).fold(weight).numpy(), paired)
    assert np.array_equal(CP(rank=1, **modes).folding((24, 30)).fold(weight).numpy(), paired)


def test_a_kernel_is_one_mode_in_the_middle_of_a_train_and_the_last_elsewhere():
    weight = weight_of(12, 10, 3, 5)
    modes = {"out_modes": (3, 4), "in_modes": (2, 5)}
    plain = weight.numpy().reshape(3, 4, 2, 5, 15)
    fold = {name: kind(rank=1, **modes).folding((12, 10, 3, 5)).fold(weight).numpy() for name, kind in FOLDED.items()}
    assert np.array_equal(fold["tt"], plain.transpose(0, 1, 4, 2, 3))
    assert np.array_equal(fold["tucker"], plain)
    paired = plain.transpose(0, 2, 1, 3, 4).reshape(6, 20, 15)
    assert np.array_equal(fold["ttm"], paired)
    assert np.array_equal(fold["cp"], paired)


@every_folded
def test_padding_is_zeros_after_the_weight_and_is_cut_off_again(kind):
    weight = weight_of(31, 37)
    setting = kind(rank=1, out_modes=(4, 8), in_modes=(5, 8), padding=(1, 3))
    folding = setting.folding((31, 37))
    padded = np.zeros((32, 40), dtype=np.float32)
    padded[:31, :37] = weight.numpy()
    exact = kind(rank=1, out_modes=(4, 8), in_modes=(5, 8)).folding((32, 40))
    assert torch.equal(folding.fold(weight), exact.fold(torch.from_numpy(padded)))
    assert torch.equal(folding.unfold(folding.fold(weight)), weight)


@every_folded
@pytest.mark.parametrize(
    "shape", [(24, 30), (31, 37), (1, 40), (12, 6, 5), (16, 8, 3, 3), (8, 4, 3, 3, 3), (24, 1, 3, 3)]
)
def test_unfolding_undoes_folding_whatever_the_layout(kind, shape):
    folding = kind(rank=1).folding(shape)
    weight = weight_of(*shape[::-1]).permute(*reversed(range(len(shape))))
    assert torch.equal(folding.unfold(folding.fold(weight)), weight)
    assert folding.fold(weight).is_contiguous()


# ----------------------------------------------------------------------------------------------- pinned settings

SHAPES = [(24, 30), (31, 37), (101, 64), (16, 8, 3, 3), (23, 29, 3), (24, 1, 3, 3)]
SETTINGS = {
    **{name: kind(rank=3) for name, kind in FOLDED.items()},
    **{f"{name} of order 3": kind(rank=3, order=3) for name, kind in FOLDED.items()},
    "reshaped-sum": ReshapedSum(rank=2),
    "sparse-product": SparseProduct(nonzeros=2, count=None),
    "joint": Joint(rank=3),
    **{f"shuffled {name}": Shuffled(rank=3, inner=name) for name in ("svd", *FOLDED)},
    **{f"shuffled {name} of order 3": Shuffled(rank=3, inner=f"{name}:order=3") for name in FOLDED},
}
every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def pairs(*, text):
    for name, setting in SETTINGS.items():
        for shape in SHAPES:
            if not text and isinstance(setting, SparseProduct) and shape[0] != 24:
                continue  # seconds to fit
            yield pytest.param(setting, shape, id=f"{name}-{shape}")


@pytest.mark.parametrize(("setting", "shape"), list(pairs(text=False)))
def test_the_pinned_setting_gives_the_same_bits_and_bytes(setting, shape):
    weight, pinned = weight_of(*shape), setting.pinned(shape)
    plain, again = setting.fit(weight).state_dict(), pinned.fit(weight).state_dict()
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert pinned.stored_bytes(shape, torch.float32) == setting.stored_bytes(shape, torch.float32)
    assert pinned.pinned(shape) == pinned
    assert torch.equal(pinned.load(shape, dict(plain)).reconstruct(), setting.fit(weight).reconstruct())


@pytest.mark.parametrize(("setting", "shape"), list(pairs(text=False)))
def test_json_of_the_pinned_setting_is_the_same_setting(setting, shape):
    pinned = setting.pinned(shape)
    assert from_dict(to_dict(pinned)) == pinned


@pytest.mark.parametrize(("setting", "shape"), list(pairs(text=True)))
def test_text_of_the_pinned_setting_is_the_same_setting(setting, shape):
    pinned = setting.pinned(shape)
    name, options = parse(str(pinned))
    assert make(name, options) == pinned


def test_text_of_none_is_read_again():
    name, options = parse(str(SparseProduct(nonzeros=3, count=None)))
    assert make(name, options) == SparseProduct(nonzeros=3, count=None)


@pytest.mark.parametrize(
    "setting",
    [
        TT(ranks=(7,), order=1),
        CP(ranks=(7,)),
        ReshapedSum(ranks=(3,), reshapes=("channel",)),
        Shuffled(ranks=(3,), inner="cp"),
    ],
    ids=str,
)
def test_text_of_a_list_of_one_is_read_again(setting):
    name, options = parse(str(setting))
    assert make(name, options) == setting


@every_folded
def test_padding_is_recorded_and_told_and_counted(kind):
    setting = kind(rank=2, order=2)
    assert setting.pinned((31, 37)).padding == (1, 3)
    assert math.prod(setting.pinned((31, 37)).out_modes) == 32
    assert math.prod(setting.pinned((31, 37)).in_modes) == 40
    assert setting.notes((31, 37))[:2] == ("31 is padded to 32", "37 is padded to 40")
    assert setting.stored_bytes((31, 37), torch.float32) == setting.stored_bytes((32, 40), torch.float32)
    assert setting.pinned((32, 40)).padding == (0, 0)
    assert setting.notes((32, 40)) == ()


@every_folded
def test_a_vocabulary_of_a_large_prime_is_folded_with_little_padding(kind):
    setting = kind(rank=4, order=2)
    (rows, width) = setting.folding((30529, 384)).padded
    assert rows - 30529 < 0.02 * 30529
    assert width == 384
    assert setting.pinned((30529, 384)).folding((30529, 384)) == setting.folding((30529, 384))


# --------------------------------------------------------------------------------------------- clipping and notes


@pytest.mark.parametrize(
    ("setting", "shape", "note"),
    [
        (TT(rank=99), (4, 6), "rank 99 is clipped to 4"),
        (TT(ranks=(9, 9, 9)), (4, 6), "ranks 9,9,9 are clipped to 2,4,3"),
        (TTMatrix(rank=99), (4, 6), "rank 99 is clipped to 4"),
        (TTMatrix(ranks=(99,)), (4, 6), "ranks 99 are clipped to 4"),
        (Tucker(rank=99), (16, 8, 3, 3), "rank 99 is clipped to 16"),
        (Tucker(ranks=(99, 3)), (16, 8, 3, 3), "ranks 99,3 are clipped to 16,3"),
        (CP(rank=999), (16, 8, 3, 3), "rank 999 is clipped to 72"),
        (Joint(rank=99), (24, 20), "rank 99 is clipped to 24"),
        (Joint(rank=99, method="svd"), (24, 20), "rank 99 is clipped to 20"),
        (SparseProduct(nonzeros=99), (4, 6), "nonzeros 99 are clipped to 4"),
        (ReshapedSum(ranks=(99, 1)), (4, 6), "term 0: rank 99 is clipped to 4"),
        (Shuffled(rank=99, inner="tucker"), (16, 8, 3, 3), "rank 99 is clipped to 16"),
    ],
    ids=str,
)
def test_sizes_above_the_dimensions_are_clipped_and_told(setting, shape, note):
    assert setting.notes(shape) == (note,)
    weight = weight_of(*shape)
    torch.testing.assert_close(
        sum(factor.numel() for factor in setting.fit(weight).parameters()),
        sum(spec.values for spec in setting.factor_specs(shape, torch.float32).values()),
    )


# --------------------------------------------------------------------------------------------------------- errors

SENSELESS = [0, -1, 1.5, True, "8", (), (2,), [2], {}, float("nan")]


@pytest.mark.parametrize("value", SENSELESS, ids=str)
@pytest.mark.parametrize("name", [name for name, kind in FORMATS.items() if "rank" in kind.option_defaults()])
def test_a_senseless_rank_is_refused_by_name(name, value):
    if name == "low-rank-sparse" and value == 0 and value is not False:
        return  # a weight without a low-rank part
    with pytest.raises(FormatError, match=r": rank must be a whole number of at least [01], got"):
        FORMATS[name](rank=value)


@every_folded
@pytest.mark.parametrize("option", ["ranks", "out_modes", "in_modes"])
@pytest.mark.parametrize(
    "value", [0, 4, 1.5, True, "8", (), (0,), (-2, 3), (2, 1.5), (True,), ("4",), ((2,),), [2], {}], ids=str
)
def test_a_senseless_list_is_refused_by_name(kind, option, value):
    size = {} if option == "ranks" else {"rank": 1}
    said = rf"^{kind.name}: {option} (is a list of whole numbers|must be a whole number)"
    with pytest.raises(FormatError, match=said):
        kind(**{**size, option: value})


@every_folded
@pytest.mark.parametrize("value", [1, (1,), (1, 2, 3), (-1, 0), (0, 1.0), (True, 0), "1,1", [0, 0], None], ids=str)
def test_a_senseless_padding_is_refused_by_name(kind, value):
    with pytest.raises(FormatError, match=rf"^{kind.name}: padding "):
        kind(rank=1, out_modes=(4, 8), in_modes=(5, 8), padding=value)


@every_folded
def test_modes_that_do_not_multiply_tell_which_product_is_needed(kind):
    with pytest.raises(
        FormatError, match=rf"^{kind.name}: out_modes=4,6 makes 24, the weight has 25; .* product is 25"
    ):
        kind(rank=1, out_modes=(4, 6), in_modes=(5, 6)).factor_specs((25, 30), torch.float32)
    with pytest.raises(FormatError, match=rf"^{kind.name}: in_modes=5,6 makes 30, the weight has 31 with 1 of padding"):
        kind(rank=1, out_modes=(4, 6), in_modes=(5, 6), padding=(0, 1)).fit(weight_of(24, 31))
    with pytest.raises(FormatError, match=rf"^{kind.name}: a padding of 30 on a size of 2 makes no sense"):
        kind(rank=1, out_modes=(4, 8), in_modes=(5, 6), padding=(30, 0)).fit(weight_of(2, 30))
    with pytest.raises(FormatError, match=rf"^{kind.name}: padding is given beside out_modes, which are not"):
        kind(rank=1, padding=(1, 0)).fit(weight_of(24, 31))


@every_folded
def test_order_and_modes_together_are_refused(kind):
    with pytest.raises(FormatError, match=rf"^{kind.name}: order is how many modes are chosen; give it or the modes"):
        kind(rank=1, order=2, out_modes=(4, 6))


@pytest.mark.parametrize("kind", [TTMatrix, CP])
def test_modes_that_have_no_partner_are_refused(kind):
    with pytest.raises(FormatError, match=rf"^{kind.name}: pairs out_modes with in_modes, but there are 2 and 3"):
        kind(rank=1, out_modes=(4, 6), in_modes=(5, 3, 2)).fit(weight_of(24, 30))


@pytest.mark.parametrize(
    ("setting", "shape", "said"),
    [
        (TT(ranks=(2, 2)), (24, 30), "tt: 2 ranks are given, modes 4,6,5,6 have 3"),
        (TTMatrix(ranks=(2, 2)), (24, 30), "ttm: 2 ranks are given, modes 24,30 have 1"),
        (Tucker(ranks=(2, 2)), (24, 30), "tucker: 2 ranks are given, modes 4,6,5,6,1 have 4"),
        (CP(ranks=(2, 2)), (16, 8, 3, 3), "cp: 2 ranks are given, modes 16,8,9 have 1"),
        (ReshapedSum(ranks=(2, 2, 2)), (24, 30), "reshaped-sum: 3 ranks are given for 2 terms"),
    ],
    ids=str,
)
def test_another_number_of_ranks_is_refused(setting, shape, said):
    for attempt in (setting.fit, lambda weight: setting.factor_specs(tuple(weight.shape), torch.float32)):
        with pytest.raises(FormatError) as caught:
            attempt(weight_of(*shape))
        assert str(caught.value) == said


@pytest.mark.parametrize("setting", [*SETTINGS.values(), SVD(rank=1)], ids=str)
@pytest.mark.parametrize("shape", [(5,), (0, 4), (4, 0, 3, 3)], ids=str)
def test_shapes_that_are_no_matrix_are_refused(setting, shape):
    with pytest.raises(FormatError, match="a weight needs two or more sizes above zero"):
        setting.factor_specs(shape, torch.float32)


def test_a_scalar_is_refused_by_sparse_product():
    with pytest.raises(FormatError, match="a weight needs two or more sizes above zero"):
        SparseProduct(nonzeros=1).factor_specs((), torch.float32)


@pytest.mark.parametrize("seed", [-1, 1.5, "x", True, None], ids=str)
@pytest.mark.parametrize(
    "name",
    ["svd", "cp", "shuffled"],
)
def test_a_senseless_seed_is_refused_by_name(name, seed):
    with pytest.raises(FormatError, match=f"^{name}: seed must be a whole number of at least 0"):
        FORMATS[name](rank=1, seed=seed)


@pytest.mark.parametrize("value", ["spatial", (), ("diagonal",), ["channel"], 3, True], ids=str)
def test_senseless_reshapes_are_refused_by_name(value):
    with pytest.raises(FormatError, match=r"^reshaped-sum: reshapes is a list of channel, spatial, paired"):
        ReshapedSum(rank=1, reshapes=value)


def test_reshapes_that_have_no_hash_are_refused_by_name():
    with pytest.raises(FormatError, match=r"^reshaped-sum: reshapes is a list of"):
        from_dict({"format": "reshaped-sum", "rank": 1, "reshapes": [{}]})


def test_an_order_beyond_all_reason_is_refused_or_done():
    try:
        TT(rank=1, order=5000).folding((16, 16))
    except FormatError:
        return


def test_ranks_of_a_group_that_are_clipped_are_told():
    assert Joint(ranks=(1, 99, 2)).notes((24, 20))


# -------------------------------------------------------------------------------------- factors that do not belong


def without_last_core(factors):
    names = sorted(name for name in factors if "cores." in name)
    return {name: factor for name, factor in factors.items() if name != names[-1]}


@pytest.mark.parametrize("drop", [without_last_core, lambda _: {}], ids=["the last", "all"])
@pytest.mark.parametrize("setting", [TT(rank=2), TTMatrix(rank=2, order=3), Shuffled(rank=2, inner="tt")], ids=str)
def test_missing_cores_are_told(setting, drop):
    factors = dict(setting.fit(weight_of(24, 20)).state_dict())
    with pytest.raises(FormatError):
        setting.load((24, 20), drop(factors))


def test_a_tucker_core_of_too_few_modes_is_told():
    with pytest.raises(FormatError, match=r"^tucker: "):
        Tucker(rank=2).load((24, 20), {"core": torch.ones(2, 1), "factors.0": torch.ones(4, 2)})


@pytest.mark.parametrize("name", ["out_basis", "in_basis"])
def test_a_joint_basis_that_is_a_scalar_is_told(name):
    factors = dict(Joint(rank=2).fit(weight_of(24, 20)).state_dict())
    with pytest.raises(FormatError, match=r"^joint: "):
        Joint(rank=2).load((24, 20), {**factors, name: torch.tensor(1.0)})


@every_folded
def test_factors_of_another_rank_than_the_settings_are_taken_as_they_are(kind):
    weight = weight_of(24, 20)
    rich = kind(rank=4).fit(weight)
    assert torch.equal(kind(rank=1).load((24, 20), dict(rich.state_dict())).reconstruct(), rich.reconstruct())
