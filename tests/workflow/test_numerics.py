"""Weights at the ends of every range, through every format and stored type, as files.

No factor on disk may be other than finite, and no error may be reported smaller than it is.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tcompress.checkpoint.manifest import read_manifest
from tcompress.checkpoint.opening import open_checkpoint
from tcompress.errors import FormatError, NumericalError
from tcompress.formats import FORMATS, make, parse
from tcompress.formats.joint import Joint
from tcompress.formats.low_rank_sparse import LowRankSparse
from tcompress.formats.sparse import Sparse
from tcompress.workflow.compression import compress
from tcompress.workflow.decompression import decompress
from tcompress.workflow.fitting import fit, fit_group
from tcompress.workflow.plan import Target, plan_for
from tcompress.workflow.settings import Settings
from tcompress.workflow.stored import rebuild
from tcompress.workflow.verification import verify

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORES = (None, torch.bfloat16, torch.float16, torch.int8, torch.int4, torch.int3)
CHEAP = (
    "svd:rank=2",
    "svd:rank=2:matricisation=spatial",
    "tt:rank=2",
    "ttm:rank=2:order=2",
    "sparse:density=0.3",
    "sparse:density=0.5:m=4",
    "sparse:density=1.0",
    "shuffled:rank=2",
    "lrs:density=0.15:rank=1:method=residual",
    "lrs:density=0.15:rank=1:rounds=5",
    "lrs:density=0.15:rank=1:rounds=5:reconstruction=masking",
    "lrs:density=0.15:rank=1:rounds=5:method=masking:reconstruction=masking",
)
DEAR = (  # on each type half of the weights
    "tt:rank=2:order=3",
    "tucker:rank=3",
    "tucker:rank=2:order=3",
    "cp:rank=2:starts=1",
    "reshaped-sum:rank=1",
    "sparse-product:nonzeros=150",
    "sparse-product:nonzeros=150:count=3",
    "joint:rank=3",
    "joint:rank=4:method=svd",
    "lrs:density=0.15:rank=1:rounds=2:low_rank=tt",
    "lrs:density=0.15:rank=1:rounds=2:low_rank=ttm:method=masking",
    "lrs:density=0.15:rank=1:rounds=2:low_rank=tucker",
    "lrs:density=0.15:rank=1:rounds=2:low_rank=cp:low_rank.starts=1",
    "lrs:density=0.999:rank=2:rounds=3",
    "lrs:density=0.15:rank=1:rounds=2:low_rank=svd:low_rank.matricisation=spatial",
)
USUAL = ("normal", "rank-deficient", "ties", "negative-zeros", "tall", "wide", "conv", "identity", "zero-rows")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(dtype):
    """Every kind of weight at the ends of what the type can hold."""
    limits = torch.finfo(dtype)
    largest, normal, smallest = limits.max, limits.smallest_normal, limits.smallest_normal * limits.eps
    low = randn(28, 3) @ randn(3, 32, seed=1)
    base = low + 0.1 * randn(28, 32, seed=2)
    unit = base / base.abs().max()
    coin = randn(28, 32, seed=3) > 0
    one = torch.zeros(28, 32, dtype=torch.float64)
    one[7, 9] = -2.5
    spike = torch.zeros(28, 32, dtype=torch.float64)
    spike[3, 3] = min(1e30, largest / 4)
    wide_range = (torch.where(coin, 1e30, 1e-30) if dtype != torch.float16 else torch.where(coin, 1e3, 1e-6)).double()
    found = {
        "normal": base,
        "denormal": unit * normal,
        "deep-denormal": unit * 16 * smallest,
        "smallest": (unit > 0.3).double() * smallest,
        "large": unit * largest / 64,
        "nearly-largest": unit * largest * 0.999,
        "largest": unit.sign() * largest,
        "mixed": base * wide_range,
        "very-mixed": torch.where(coin, unit * largest / 2**20, unit * normal * 2**20),
        "rank-deficient": low,
        "constant": torch.full((28, 32), 0.7, dtype=torch.float64),
        "zero": torch.zeros(28, 32, dtype=torch.float64),
        "negative-zero": torch.full((28, 32), -0.0, dtype=torch.float64),
        "negative-zeros": torch.where(coin, base, -0.0),
        "one-entry": one,
        "outlier": base + spike,
        "outlier-of-ones": 1 + spike,
        "row": randn(1, 900),
        "column": randn(900, 1),
        "single": randn(1, 1),
        "ties": randn(28, 32, seed=6).sign() * (0.5 + 0.5 * coin.double()),
        "tall": randn(150, 8) @ randn(8, 8),
        "wide": randn(8, 152),
        "conv": randn(12, 8, 3, 3),
        "depthwise": randn(100, 1, 3, 3),
        "large-conv": randn(12, 8, 3, 3) / 8 * largest,
        "tiny-conv": randn(12, 8, 3, 3) / 8 * normal,
        "identity": torch.eye(32, dtype=torch.float64),
        "zero-rows": base * (torch.arange(28) % 3 == 0)[:, None],
    }
    return {kind: weight.to(dtype) for kind, weight in found.items()}


def length(values):
    """The Frobenius norm of values of any range."""
    largest = np.abs(values).max()
    return largest * np.sqrt(np.square(values / largest).sum()) if largest else largest


def true_figures(weight, rebuilt):
    """Norm and relative error, in the widest type there is and without squares of what is large or small."""
    before, after = (each.double().numpy().astype(np.longdouble) for each in (weight, rebuilt))
    norm = length(before)
    return norm, length(before - after) / norm if norm else np.longdouble(0)


def check_figures(weight, rebuilt, norm, error):
    true_norm, true_error = map(float, true_figures(weight, rebuilt))
    assert norm == pytest.approx(true_norm, rel=2e-6, abs=1e-323)  # the smallest have no more digits
    assert true_error * (1 - 1e-6) <= error <= true_error * 1.0001 + 1e-12


def check_files(source, plan, out, how):
    """Compress, and look at everything that came out; returns the reasons of the layers that stayed dense, by name."""
    result = compress(open_checkpoint(source), plan, out=out, settings=how)
    assert all(part.isfinite().all() for part in load_file(out).values() if part.is_floating_point())
    dense = out.with_name("dense.safetensors")
    decompress(open_checkpoint(out), out=dense, force=True)
    assert verify(open_checkpoint(out), against=open_checkpoint(source)).problems == ()
    before, after, entries = load_file(source), load_file(dense), read_manifest(open_checkpoint(out)).layers
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].isfinite().all()
        if name in entries:
            check_figures(weight, after[name], entries[name].norm, entries[name].relative_error)
        else:
            assert torch.equal(after[name].reshape(-1).view(torch.uint8), weight.reshape(-1).view(torch.uint8))
    reasons = {row.layer.name: row.reason for row in result.layers if row.format is None}
    assert all(reasons.values())
    assert not reasons.keys() & entries.keys()
    return reasons


def setting_of(text):
    name, options = parse(text)
    return make(name, options)


def fits_shape(setting, shape):
    try:
        setting.factor_specs(shape, torch.float32)
    except FormatError:
        return False
    return True


def layers_of(kinds, setting):
    """The weights as layers; of a format of several layers three of each, which have something in common."""
    if isinstance(setting, Joint):
        return {
            f"{kind}.{number}.weight": weight * factor
            for kind, weight in kinds.items()
            for number, factor in enumerate((1, -1, 0.5))
        }
    return {f"{kind}.0.weight": weight for kind, weight in kinds.items()}


def runs():
    """Every setting on every type, and every format in every stored type."""
    texts = (*CHEAP, *DEAR)
    found = [
        (text, dtype, STORES[(index + number) % len(STORES)], number)
        for index, text in enumerate(texts)
        for number, dtype in enumerate(DTYPES)
    ]
    by_name = {setting_of(text).name: text for text in texts}
    tried = {(setting_of(text).name, store) for text, _, store, _ in found}
    for index, (name, store) in enumerate(product(by_name, STORES)):
        if (name, store) not in tried:
            found.append((by_name[name], DTYPES[index % 2], store, index))
    return found


def test_every_format_is_tried_in_every_stored_type():
    tried = {(setting_of(text).name, store) for text, _, store, _ in runs()}
    assert tried == {(name, store) for name in FORMATS for store in STORES}


@pytest.mark.parametrize(("text", "dtype", "store", "number"), runs(), ids=str)
def test_files_are_finite_and_errors_honest(tmp_path, text, dtype, store, number):
    setting, kinds = setting_of(text), weights(dtype)
    kinds = {kind: weight for kind, weight in kinds.items() if fits_shape(setting, tuple(weight.shape))}
    if text in DEAR:
        kinds = dict(list(kinds.items())[number % 2 :: 2])
    save_file(layers_of(kinds, setting), tmp_path / "model.safetensors")
    how = Settings(store=store)
    reasons = check_files(tmp_path / "model.safetensors", plan_for(setting), tmp_path / "out.safetensors", how)
    legal = ("larger than dense", "no setting is smaller") if not isinstance(setting, Joint) else ("",)
    for kind in USUAL:
        reason = reasons.get(f"{kind}.0.weight")
        assert reason is None or reason.startswith(legal), f"{kind}: {reason}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "choice",
    [
        LowRankSparse(density=0.1, rank=1, rounds=3),
        LowRankSparse(density=0.1, rank=1, rounds=3, method="masking", reconstruction="masking"),
        Sparse(density=0.3),
        Target(Sparse, {}, keep=0.4),
        Target(LowRankSparse, {"rounds": 3, "rank": 1}, keep=0.4),
    ],
    ids=str,
)
def test_one_threshold_for_layers_of_all_ranges(tmp_path, choice, dtype):
    save_file(layers_of(weights(dtype), choice), tmp_path / "model.safetensors")
    plan = plan_for(choice, one_threshold=True)
    check_files(tmp_path / "model.safetensors", plan, tmp_path / "out.safetensors", Settings())


@pytest.mark.parametrize(("dtype", "store"), [(torch.float32, None), (torch.float16, torch.int8)], ids=str)
@pytest.mark.parametrize(
    "target",
    [
        Target(LowRankSparse, {"share": "auto", "rounds": 2}, keep=0.5),
        Target(LowRankSparse, {"rank": 1}, tolerance=0.4),
    ],
    ids=str,
)
def test_settings_found_by_looking_at_the_weight(tmp_path, target, dtype, store):
    kinds = {kind: w for kind, w in weights(dtype).items() if kind not in {"row", "column", "tall", "conv", "wide"}}
    save_file(layers_of(kinds, target), tmp_path / "model.safetensors")
    check_files(tmp_path / "model.safetensors", plan_for(target), tmp_path / "out.safetensors", Settings(store=store))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_stays_dense_bit_by_bit_or_is_refused(tmp_path, name, dtype):
    setting = setting_of(next(text for text in (*CHEAP, *DEAR) if setting_of(text).name == name))
    layers = {}
    for kind, value in {"nan": math.nan, "inf": math.inf, "negative": -math.inf}.items():
        weight = randn(28, 32).to(dtype)
        weight[5, 6] = value
        layers.update(layers_of({kind: weight}, setting))
    source, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file({**layers, **layers_of({"normal": weights(dtype)["normal"]}, setting)}, source)
    with pytest.raises(NumericalError, match="NaN or Inf"):
        compress(open_checkpoint(source), plan_for(setting), out=out)
    assert not out.exists()
    result = compress(open_checkpoint(source), plan_for(setting), out=out, settings=Settings(allow_nonfinite=True))
    reasons = {row.layer.name: row.reason for row in result.layers if row.format is None}
    written = open_checkpoint(out)
    for layer in layers:
        assert reasons[layer] == "holds 1 value that is NaN or Inf"
        assert written.raw(layer) == open_checkpoint(source).raw(layer)


def test_a_norm_beyond_float64_is_refused_with_a_reason(tmp_path):
    save_file({"fc.weight": weights(torch.float64)["largest"]}, tmp_path / "model.safetensors")
    how = Settings()
    reasons = check_files(
        tmp_path / "model.safetensors", plan_for(Sparse(density=0.3)), tmp_path / "out.safetensors", how
    )
    assert (
        reasons["fc.weight"]
        == "sparse:density=0.3: the weight's norm exceeds the range of float64; scale the weight down"
    )


def of_patterns(patterns, rows):
    """A finite float32 matrix of any bit patterns."""
    bits = np.array(patterns, dtype=np.uint32)
    bits[(bits >> 23) & 0xFF == 0xFF] ^= 1 << 30
    return torch.from_numpy(bits.view(np.float32).copy()).reshape(rows, -1)


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 6)) * 4
    anything = st.one_of(
        st.integers(0, (1 << 32) - 1),
        st.sampled_from([0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0xBF800000]),
    )
    return of_patterns(draw(st.lists(anything, min_size=rows * columns, max_size=rows * columns)), rows)


def check_fit(weight, setting, store):
    before = weight.clone()
    try:
        if isinstance(setting, Joint):
            shared, found = fit_group([weight, -weight], setting, store=store, device=CPU)
            fits = [({**{name: f.values for name, f in shared.items()}, **each.factors}, each) for each in found]
        else:
            single = fit(weight, setting, store=store, device=CPU)
            again = fit(weight, setting, store=store, device=CPU)
            assert all(torch.equal(single.factors[name], again.factors[name]) for name in single.factors)
            fits = [(single.factors, single)]
    except (NumericalError, FormatError):
        return
    finally:
        assert torch.equal(weight.view(torch.int32), before.view(torch.int32))
    for (factors, each), original in zip(fits, (weight, -weight), strict=False):
        assert all(factor.isfinite().all() for factor in factors.values())
        assert all(p.isfinite().all() for s in each.stored.values() for p in s.parts.values() if p.is_floating_point())
        rebuilt = rebuild(setting, tuple(weight.shape), factors, dtype=weight.dtype, device=CPU)
        assert rebuilt.isfinite().all()
        check_figures(original, rebuilt, each.norm, each.relative_error)


@pytest.mark.parametrize("text", [*CHEAP, *DEAR])
def test_any_bit_patterns(text):
    setting = setting_of(text.replace("nonzeros=150", "nonzeros=20"))

    @settings(derandomize=True, max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(weight=matrices(), store=st.sampled_from([torch.float32, torch.bfloat16]))
    def attack(weight, store):
        check_fit(weight, setting, store)

    attack()
