"""Layers made of every format and stored type, beside the dense layers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from tcompress.encodings import INT3, INT4
from tcompress.formats import Format, make, parse
from tcompress.formats.grouped import GroupFormat
from tcompress.runtime.install import factorized
from tcompress.runtime.modules import Factorized
from tcompress.runtime.packed import Packed, assemble
from tcompress.workflow.fitting import fit, fit_group
from tcompress.workflow.stored import StoredFactor, rebuild

CPU = torch.device("cpu")
CACHES = ("auto", "always", "never")
STORES = {"own": None, "bf16": torch.bfloat16, "int8": torch.int8, "int4": INT4, "int3": INT3}
MATRIX, KERNEL = (48, 40), (16, 12, 3, 3)
TEXTS = {
    "svd": "svd:rank=3",
    "spatial svd": "svd:rank=3:matricisation=spatial",
    "full svd": "svd:rank=40",
    "tt": "tt:rank=3",
    "ttm": "ttm:rank=3",
    "tucker": "tucker:rank=3:order=1",
    "cp": "cp:rank=3",
    "paired cp": "cp:rank=3:order=2",
    "reshaped-sum": "reshaped-sum:rank=2",
    "sparse-product": "sparse-product:nonzeros=3:count=3",
    "sparse": "sparse:density=0.2",
    "sparse in groups": "sparse:density=0.25:m=4",
    "low-rank-sparse": "low-rank-sparse:rank=3:density=0.1:rounds=3",
    "masking low-rank-sparse": "low-rank-sparse:rank=3:density=0.1:rounds=3:reconstruction=masking",
    "low-rank-sparse without low rank": "low-rank-sparse:rank=0:density=0.1",
    "shuffled": "shuffled:inner=tt:rank=3",
    "joint": "joint:rank=3",
    "joint svd": "joint:rank=3:method=svd",
}
SPARSE = ("sparse-product", "sparse", "sparse in groups", "low-rank-sparse", "masking low-rank-sparse")


@dataclass(frozen=True)
class Stored:
    """What a layer's file would hold."""

    setting: Format
    shape: tuple[int, ...]
    factors: dict[str, StoredFactor]

    def held(self, learns: bool = True) -> dict[str, nn.Parameter | Packed]:
        found: dict[str, nn.Parameter | Packed] = {}
        for name, factor in self.factors.items():
            parts = {part: tensor.clone() for part, tensor in factor.parts.items()}
            plain = factor.coding.is_plain_tensor
            shape = tuple(factor.values.shape)
            found[name] = nn.Parameter(parts[""]) if plain else Packed(factor.coding, parts, shape)
            found[name].requires_grad_(learns)
        return found

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = {name: factor.values for name, factor in self.factors.items()}
        return rebuild(self.setting, self.shape, values, dtype=dtype, device=CPU)


def setting_of(text: str) -> Format:
    kind, options = parse(text)
    return make(kind, options)


def weight_like(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Of low rank, with noise."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = torch.Size(shape[1:]).numel()
    low = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, fan_in, generator=generator)
    return ((low + 0.3 * torch.randn(low.shape, generator=generator)) / fan_in**0.5).reshape(shape)


@cache
def stored(
    name: str, shape: tuple[int, ...] = MATRIX, store: str = "own", dtype: torch.dtype = torch.float32
) -> Stored:
    setting, into = setting_of(TEXTS.get(name, name)), STORES[store] or dtype
    if isinstance(setting, GroupFormat):
        weights = [weight_like(shape, seed).to(dtype) for seed in (1, 2)]
        common, own = fit_group(weights, setting, store=into, device=CPU)
        return Stored(setting, shape, {**own[0].stored, **common})
    fitted = fit(weight_like(shape).to(dtype), setting, store=into, device=CPU)
    return Stored(setting, shape, dict(fitted.stored))


def twin(dense: nn.Module, of: Stored) -> nn.Module:
    """The dense layer with the weight that decompression gives."""
    with torch.no_grad():
        dense.weight.copy_(of.weight())
    return dense


def replaced(dense: nn.Module, of: Stored, cache: str = "auto") -> Factorized:
    """The factorised layer in the place of a dense one, bias and all."""
    weight = dense.weight
    factors = assemble(of.setting, of.shape, of.held(weight.requires_grad), weight.dtype)
    return factorized(dense, factors, of.setting, like=weight, cache=cache, origin=None)


def linear(name: str, store: str = "own", cache: str = "auto", **options) -> tuple[nn.Module, Factorized]:
    of = stored(name, MATRIX, store)
    dense = twin(nn.Linear(MATRIX[1], MATRIX[0], **options), of)
    return dense, replaced(dense, of, cache)


def conv(name: str, store: str = "own", cache: str = "auto", **options) -> tuple[nn.Module, Factorized]:
    of = stored(name, KERNEL, store)
    dense = twin(nn.Conv2d(KERNEL[1], KERNEL[0], 3, **options), of)
    return dense, replaced(dense, of, cache)


def embedding(name: str, store: str = "own", cache: str = "auto", **options) -> tuple[nn.Module, Factorized]:
    of = stored(name, MATRIX, store)
    dense = twin(nn.Embedding(*MATRIX, **options), of)
    return dense, replaced(dense, of, cache)


def numbers(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    """Whether two outputs differ by rounding alone."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    scale = expected.double().abs().max().clamp_min(1e-30)
    return bool((found.double() - expected.double()).abs().max() <= relative * scale)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)
