"""The element types of checkpoint files: safetensors' code, PyTorch's name, size and ``torch.dtype``."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DType:
    """One element type.

    ``code`` is what stands in a safetensors header, ``name`` what people and manifests call it.
    ``torch`` is None for types that PyTorch cannot hold one element at a time; such tensors are only copied.
    """

    code: str
    name: str
    bits: int
    torch: torch.dtype | None

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 0 for types below a byte."""
        return self.bits // 8

    @property
    def is_floating(self) -> bool:
        """Whether values of this type can be factorised: real floating point of 16 bits and more."""
        return self.code in {"F64", "F32", "F16", "BF16"}


_ALL = (
    DType("F64", "float64", 64, torch.float64),
    DType("F32", "float32", 32, torch.float32),
    DType("F16", "float16", 16, torch.float16),
    DType("BF16", "bfloat16", 16, torch.bfloat16),
    DType("C64", "complex64", 64, torch.complex64),
    DType("I64", "int64", 64, torch.int64),
    DType("I32", "int32", 32, torch.int32),
    DType("I16", "int16", 16, torch.int16),
    DType("I8", "int8", 8, torch.int8),
    DType("U64", "uint64", 64, torch.uint64),
    DType("U32", "uint32", 32, torch.uint32),
    DType("U16", "uint16", 16, torch.uint16),
    DType("U8", "uint8", 8, torch.uint8),
    DType("BOOL", "bool", 8, torch.bool),
    DType("F8_E4M3", "float8_e4m3fn", 8, torch.float8_e4m3fn),
    DType("F8_E5M2", "float8_e5m2", 8, torch.float8_e5m2),
    DType("F8_E4M3FNUZ", "float8_e4m3fnuz", 8, torch.float8_e4m3fnuz),
    DType("F8_E5M2FNUZ", "float8_e5m2fnuz", 8, torch.float8_e5m2fnuz),
    DType("F8_E8M0", "float8_e8m0fnu", 8, torch.float8_e8m0fnu),
    DType("F6_E2M3", "float6_e2m3", 6, None),
    DType("F6_E3M2", "float6_e3m2", 6, None),
    DType("F4", "float4", 4, None),
)

BY_CODE = {dtype.code: dtype for dtype in _ALL}
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_TORCH = {dtype.torch: dtype for dtype in _ALL if dtype.torch is not None}
