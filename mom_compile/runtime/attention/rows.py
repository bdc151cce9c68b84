"""Attention with a mask in blocks of rows, so that masks and scores exist for one block at a time.

Terms
-----
position    Row `i` of a call has position `start + i` among the keys.
bias        An additive mask for the keys in sight of a block of rows: 0 or the user's values, -inf for masked keys.
            `[B or 1, H or 1, rows or 1, keys in sight]`.
block kernel
            `(query, key, value, bias, scale) -> part`, for one block of rows; not causal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch

from mom_compile.runtime.attention.merging import Part, merge
from mom_compile.runtime.observers import Observers
from mom_passes.ops.attention import AttentionCall, visible

BlockKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], Part]

#: Limit on the bytes of a block's bias or scores. Blocks below 32 rows would make matmuls inefficient.
BLOCK_BYTES = 16 << 20
FEWEST_ROWS = 32

_OBSERVERS: Observers[AttentionCall] = Observers()


def observing_blocks(observer: Callable[[AttentionCall], None]) -> AbstractContextManager[None]:
    """Within this context, call `observer` with every attention that is computed in blocks of rows."""
    return _OBSERVERS.joined_by(observer)


def keys_in_sight(call: AttentionCall) -> tuple[int, int]:
    """Return the range of keys that some row may see by its position; it may be empty."""
    if not call.is_causal:
        return 0, call.tokens
    low = 0 if call.window is None else max(0, call.start - call.window + 1)
    return low, min(call.tokens, call.start + call.rows)


def bias_of(call: AttentionCall, low: int, high: int) -> torch.Tensor | None:
    """Return the bias for keys `[low, high)`. A mask that needs no change is not copied."""
    query, mask = call.query, call.mask
    if mask is not None and mask.shape[-1] != 1:
        mask = mask.narrow(-1, low, high - low)
    seen = _seen(call, low, high)
    if seen is not None and (mask is None or mask.dtype == torch.bool):
        mask = seen if mask is None else seen & mask
    elif seen is not None and mask is not None:
        return mask.to(_bias_dtype(mask, query)).masked_fill(~seen, -math.inf)
    if mask is None or mask.dtype != torch.bool:
        return mask if mask is None else mask.to(_bias_dtype(mask, query))
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -math.inf)


def _seen(call: AttentionCall, low: int, high: int) -> torch.Tensor | None:
    """Return the mask for those keys by position and conditions, or None if nothing is masked."""
    seen, rows, device = None, call.rows, call.query.device
    if call.is_causal:
        seen = visible(rows, high - low, call.start - low, call.window, device)
    if call.has_conditions:
        window = None if call.is_causal else call.window
        allowed = call.conditions.visible((call.start, call.start + rows), (low, high), window, device)
        seen = allowed if seen is None else seen & allowed
    return seen


def bias_bytes_per_row(call: AttentionCall, keys: int | None = None) -> int:
    """Return the bytes that `bias_of` allocates per row, for all keys or the given number of them.

    0 if it returns the mask itself, or one row for all.
    """
    mask, conditions = call.mask, call.has_conditions
    if not call.is_causal and not conditions:
        unchanged = mask is None or mask.dtype == _bias_dtype(mask, call.query)
        if unchanged or mask is None or mask.shape[-2] == 1:
            return 0
    repeats = 1 if mask is None else math.prod(mask.shape[:-2])
    repeats = max(repeats, call.query.shape[0] if conditions else 1)
    return repeats * (call.tokens if keys is None else keys) * call.query.element_size()


def _bias_dtype(mask: torch.Tensor, query: torch.Tensor) -> torch.dtype:
    """Kernels take a bias of the query's dtype, or float32 for half-precision queries."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and mask.dtype == torch.float32 else query.dtype


def row_blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """`(first, count)` of each block."""
    for first in range(0, rows, size):
        yield first, min(size, rows - first)


def in_blocks(
    kernel: BlockKernel, call: AttentionCall, bytes_per_row: int, most_rows: int | None = None
) -> torch.Tensor:
    """Run `kernel` on blocks of rows, each with the keys in its sight. Returns `[B, H, R, Dv]`, token-major.

    `bytes_per_row` is what kernel and bias allocate per row of the query.
    """
    for observe in _OBSERVERS.now:
        observe(call)
    rows = call.rows
    size = rows if bytes_per_row == 0 else max(FEWEST_ROWS, BLOCK_BYTES // bytes_per_row)
    size = min(size, rows, most_rows or rows)
    if size == rows:
        return token_major(_block(kernel, call), call)
    result = call.output()
    for first, count in row_blocks(rows, size):
        result.narrow(2, first, count).copy_(_block(kernel, call.of_rows(first, count)))
    return result


def _block(kernel: BlockKernel, call: AttentionCall) -> torch.Tensor:
    low, high = keys_in_sight(call)
    if low >= high:
        return call.output().zero_()
    key, value = (t.narrow(2, low, high - low) for t in (call.key, call.value))
    return merge([kernel(call.query, key, value, bias_of(call, low, high), call.scale)], call.sinks)


def token_major(result: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Return the result in the layout and dtype of `mom::attention`; a copy only if it differs."""
    if result.dtype == call.query.dtype and result.transpose(1, 2).is_contiguous():
        return result
    return call.output().copy_(result)


def in_blocks_of_products(call: AttentionCall) -> torch.Tensor:
    """Compute calls that no kernel supports by matmuls and a softmax, in blocks of rows."""
    return in_blocks(partial(_products, softcap=call.softcap), call, math_bytes_per_row(call))


def _products(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Part:
    """Two matmuls and a softmax, at least in float32; grouped heads share one matmul."""
    batch, heads, rows, channels = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, key.shape[1], -1, channels)
    scores = (grouped @ key.to(wide).transpose(-1, -2)).mul_(scale).view(batch, heads, rows, -1)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    if bias is not None:
        scores += bias
    most = scores.amax(-1, keepdim=True)
    # A row that sees nothing gets zero weights, whose sum is zero, instead of exp(NaN).
    weights = scores.sub_(most.masked_fill(most == -math.inf, 0.0)).exp_()
    sums = weights.sum(-1, keepdim=True)
    result = (weights.view(batch, key.shape[1], -1, key.shape[2]) @ value.to(wide)).view(batch, heads, rows, -1)
    result.div_(sums.masked_fill(sums == 0, 1.0))
    return result.to(query.dtype), sums.log_().add_(most).squeeze(-1)


def math_bytes_per_row(call: AttentionCall) -> int:
    """Bytes per row of the scores, which become the weights in place, at least in float32."""
    query = call.query
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.shape[0] * query.shape[1] * call.tokens * wide.itemsize
