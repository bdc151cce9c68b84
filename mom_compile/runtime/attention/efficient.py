"""PyTorch's memory-efficient operator on CUDA, for any head sizes, float32 included. Its tests ran on an H200.

It works on `[B, tokens, heads, D]` without grouped heads. Each key head is passed as a batch entry of its own, expanded
to its query heads: a view. Repeated keys would take gigabytes per call for 150,000 tokens.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from mom_compile.runtime.attention.merging import Part
from mom_compile.runtime.attention.rows import BlockKernel
from mom_passes.ops.attention import AttentionCall

EFFICIENT = torch.ops.aten._efficient_attention_forward.default

#: Mask modes of `EFFICIENT`.
NOT_MASKED, CAUSAL_LOWER_RIGHT = 0, 2


def efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    masked: int = NOT_MASKED,
) -> Part:
    """Attention with as many key heads as query heads. Rows that see nothing are zeroed, as the kernel may not do so.

    The kernel pads its sums to whole tiles of rows; the padding is removed.
    """
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    added = None
    if bias is not None:
        added = _aligned(bias.to(query.dtype).expand(*bias.shape[:-1], key.shape[2])).expand(*query.shape[:3], -1)
    found, sums, *_ = EFFICIENT(q, k, v, added, None, None, None, None, 0.0, masked, True, scale=scale)
    result, sums = found.transpose(1, 2), sums.narrow(-1, 0, query.shape[2])
    if bias is None:
        return result, sums
    blind = bias.amax(-1, keepdim=True) == -torch.inf
    return result.masked_fill(blind, 0.0), sums.masked_fill(blind.squeeze(-1), -torch.inf)


def efficient_causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Part:
    return efficient(query, key, value, bias, scale, CAUSAL_LOWER_RIGHT)


def efficient_grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Part:
    return grouped(efficient, query, key, value, bias, scale)


#: The kernel reads a bias in groups of 16 bytes. Rows that are not aligned are copied to rows of a multiple of this.
ALIGNED = 8


def _aligned(bias: torch.Tensor) -> torch.Tensor:
    """Return the bias with adjacent columns and each row at a multiple of `ALIGNED` from the storage's start."""
    if bias.stride(-1) == 1 and not any(n % ALIGNED for n in (bias.storage_offset(), *bias.stride()[:-1])):
        return bias
    return pad(bias, (0, -bias.shape[-1] % ALIGNED)).narrow(-1, 0, bias.shape[-1])


def bytes_of_aligned(call: AttentionCall) -> int:
    """Return the bytes per row of that copy."""
    return 0 if call.mask is None else math.prod(call.mask.shape[:-2]) * call.tokens * call.query.element_size()


def grouped(
    kernel: BlockKernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> Part:
    """Run a kernel without grouped heads on grouped heads. Returns `[B, H, R, Dv]`, token-major if heads are grouped.

    For each batch entry, keys `[G, T, D]` become a batch of G with one head, expanded to its H / G query heads.
    """
    batch, heads, rows, _ = query.shape
    groups = key.shape[1]
    if groups == heads:
        return kernel(query, key, value, bias, scale)
    result = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
    sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
    for i in range(batch):
        q, out = (t[i].unflatten(0, (groups, -1)) for t in (query, result))
        k, v = (t[i].unsqueeze(1).expand(-1, heads // groups, -1, -1) for t in (key, value))
        found, sums_of_entry = kernel(q, k, v, _bias_of_entry(bias, i, groups), scale)
        out.copy_(found)
        sums[i].unflatten(0, (groups, -1)).copy_(sums_of_entry)
        del found, sums_of_entry  # before those of the next entry are made
    return result, sums


def _bias_of_entry(bias: torch.Tensor | None, i: int, groups: int) -> torch.Tensor | None:
    """Reshape `[B or 1, H or 1, R or 1, T]` to broadcast to `[G, H / G, R, T]`."""
    if bias is None:
        return None
    while bias.dim() < 4:
        bias = bias.unsqueeze(0)
    own = bias[i if bias.shape[0] > 1 else 0]
    return own.unsqueeze(0) if own.shape[0] == 1 else own.unflatten(0, (groups, -1))
