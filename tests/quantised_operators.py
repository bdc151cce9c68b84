"""The operators of bitsandbytes that have chunk rules: the package's own where it is installed, else stand-ins.

A stand-in has the name and the schema of the package's operator and computes what that does on a CPU, in plain PyTorch:
weights of 4 bits, two to a byte, in blocks with a scale each; int8 with a scale for each row.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
#: The 16 values of "nf4", as the package has them.
NF4 = (-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0)  # fmt: skip

SCHEMAS = {
    "gemm_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    "gemv_4bit": "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)",
    "int8_mm_dequant": "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
    "-> Tensor",
    "int8_scaled_mm": "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
}


def packed(weight: torch.Tensor, blocksize: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, two to a byte `[N * K / 2, 1]`, and the scale of each block of `blocksize` weights."""
    blocks = weight.float().reshape(-1, blocksize)
    scales = blocks.abs().amax(1)
    nearest = (blocks / scales[:, None])[..., None].sub(torch.tensor(NF4)).abs().argmin(-1).reshape(-1)
    return (nearest[::2] * 16 + nearest[1::2]).to(torch.uint8)[:, None], scales


def _weights(packed: torch.Tensor, shape: list[int], scales: torch.Tensor, code: torch.Tensor, block: int) -> Any:
    halves = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)
    return (code[halves.long()].reshape(-1, block) * scales[:, None]).reshape(shape)


def _gemm(A, B, shapeB, absmax, blocksize, quant_type, bias=None, *nested):
    assert quant_type == "nf4" and not any(one is not None for one in nested)
    weights = _weights(B, shapeB, absmax, torch.tensor(NF4), blocksize).to(A.dtype)
    return torch.nn.functional.linear(A, weights, bias)


def _gemv(A, B, shapeB, absmax, code, blocksize):
    return torch.nn.functional.linear(A, _weights(B, shapeB, absmax, code, blocksize).to(A.dtype))


def _int8_product(A, B):
    return (A.double() @ B.double().t()).to(torch.int32)


def _quant(A, threshold=0.0):
    outliers = (A.abs() >= threshold) if threshold else torch.zeros_like(A, dtype=torch.bool)
    scales = A.masked_fill(outliers, 0).abs().amax(1).float()
    columns = outliers.any(0)
    rows = (A * (127.0 / scales[:, None])).round().masked_fill(columns, 0).to(torch.int8)
    return rows, scales, columns.nonzero()[:, 0] if threshold else None


def _dequant(A, row_stats, col_stats, dtype=None, bias=None):
    out = A * (row_stats[:, None] * col_stats) * 6.200124e-05
    return (out if bias is None else out + bias).to(dtype or torch.float16)


def _scaled(A, B, row_stats, col_stats, bias=None, dtype=None):
    return _dequant(_int8_product(A, B), row_stats, col_stats, dtype, bias)


def _shape_of_gemm(A, B, shapeB, *_, **__):
    return A.new_empty((*A.shape[:-1], shapeB[0]))


def _define() -> None:
    """For as long as the process lives, as an import of the package would."""
    library = torch.library.Library("bitsandbytes", "DEF")
    kernels = (_gemm, _gemv, _int8_product, _quant, _dequant, _scaled)
    for (name, schema), kernel in zip(SCHEMAS.items(), kernels, strict=True):
        library.define(name + schema)
        library.impl(name, kernel, "CPU")
    for name in ("gemm_4bit", "gemv_4bit"):
        torch.library.register_fake(f"bitsandbytes::{name}", _shape_of_gemm, lib=library)
    torch.library.register_fake("bitsandbytes::int8_vectorwise_quant", _shape_of_quant, lib=library)
    torch.library.register_fake("bitsandbytes::int8_scaled_mm", _shape_of_scaled, lib=library)
    _KEPT.append(library)


def _shape_of_quant(A, threshold=0.0):
    return A.new_empty(A.shape, dtype=torch.int8), A.new_empty(A.shape[:1], dtype=torch.float32), None


def _shape_of_scaled(A, B, row_stats, col_stats, bias=None, dtype=None):
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype or torch.float16)


_KEPT: list[Any] = []
if INSTALLED:
    import bitsandbytes  # noqa: F401
else:
    _define()
