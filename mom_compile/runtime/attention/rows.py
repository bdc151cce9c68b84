"""Attention with a mask in blocks of rows, so that no mask or score matrix beyond a block is ever made.

Terms
-----
position    Where a query row stands among the keys: row `i` of a call stands at `start + i`.
bias        An additive mask for the keys in sight of a block of rows: 0 or what the user adds, -inf where
            nothing may be seen. `[B or 1, H or 1, rows or 1, keys in sight]`.
kernel      `(query, key, value, bias, scale) -> result`, for one block of rows; nothing is causal in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mom_passes.ops.attention import KeyConditions, output_like, visible

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float], torch.Tensor]

#: Bytes a block may spend on its bias or its scores. Blocks below 32 rows would starve the matmuls.
BLOCK_BYTES = 16 << 20
FEWEST_ROWS = 32


@dataclass(frozen=True)
class Sight:
    """Which keys the rows of a call may see: by position if `is_causal`, the last `window` of those, and by mask; and
    what is said of each key by itself."""

    start: int
    is_causal: bool
    window: int | None = None
    mask: torch.Tensor | None = None
    conditions: KeyConditions = field(default_factory=KeyConditions)

    def keys(self, first: int, rows: int, keys: int) -> tuple[int, int]:
        """The range of keys that some row of `[first, first + rows)` may see; it may be empty."""
        if not self.is_causal:
            return 0, keys
        position = self.start + first
        low = 0 if self.window is None else max(0, position - self.window + 1)
        return low, min(keys, position + rows)

    def bias(self, first: int, rows: int, low: int, high: int, query: torch.Tensor) -> torch.Tensor | None:
        """The bias of rows `[first, first + rows)` for keys `[low, high)`. A mask that fits is not copied."""
        mask = None if self.mask is None else _cut(_cut(self.mask, -2, first, first + rows), -1, low, high)
        seen = self._seen(first, rows, low, high, query.device)
        if seen is not None and (mask is None or mask.dtype == torch.bool):
            mask = seen if mask is None else seen & mask
        elif seen is not None and mask is not None:
            return mask.to(_bias_dtype(mask, query)).masked_fill(~seen, -math.inf)
        if mask is None or mask.dtype != torch.bool:
            return mask if mask is None else mask.to(_bias_dtype(mask, query))
        return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, -math.inf)

    def _seen(self, first: int, rows: int, low: int, high: int, device: torch.device) -> torch.Tensor | None:
        """What position and conditions let those rows see of those keys; None if that is everything."""
        seen = None
        if self.is_causal:
            seen = visible(rows, high - low, self.start + first - low, self.window, device)
        if self.conditions:
            at = (self.start + first, self.start + first + rows)
            window = None if self.is_causal else self.window
            allowed = self.conditions.visible(at, (low, high), window, device)
            seen = allowed if seen is None else seen & allowed
        return seen

    def bias_bytes_per_row(self, query: torch.Tensor, keys: int) -> int:
        """Bytes that `bias` allocates for each row; 0 if it hands out the mask itself or one row for all."""
        if not self.is_causal and not self.conditions:
            as_it_is = self.mask is None or self.mask.dtype == _bias_dtype(self.mask, query)
            if as_it_is or self.mask is None or self.mask.shape[-2] == 1:
                return 0
        repeats = 1 if self.mask is None else math.prod(self.mask.shape[:-2])
        repeats = max(repeats, query.shape[0] if self.conditions else 1)
        return repeats * keys * query.element_size()


def useful_window(window: int | None, end: int) -> int | None:
    """None for a window that rows ending at `end` do not feel."""
    return None if window is not None and window >= end else window


def _bias_dtype(mask: torch.Tensor, query: torch.Tensor) -> torch.dtype:
    """Kernels take a bias of the query's dtype, or a float32 one for half-precision queries."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and mask.dtype == torch.float32 else query.dtype


def _cut(mask: torch.Tensor, dim: int, low: int, high: int) -> torch.Tensor:
    return mask if mask.shape[dim] == 1 else mask.narrow(dim, low, high - low)


def row_blocks(rows: int, size: int) -> Iterator[tuple[int, int]]:
    """`(first, count)` of each block."""
    for first in range(0, rows, size):
        yield first, min(size, rows - first)


def in_blocks(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight,
    scale: float,
    bytes_per_row: int,
    most_rows: int | None = None,
) -> torch.Tensor:
    """`kernel` over blocks of rows, each against the keys in its sight alone. `[B, H, R, Dv]`, token-major.

    `bytes_per_row` is what kernel and bias allocate for each row of the query.
    """
    rows = query.shape[2]
    size = rows if bytes_per_row == 0 else max(FEWEST_ROWS, BLOCK_BYTES // bytes_per_row)
    size = min(size, rows, most_rows or rows)
    if size == rows:
        return token_major(_block(kernel, query, key, value, sight, scale, 0), query, value)
    result = output_like(query, value)
    for first, count in row_blocks(rows, size):
        block = query.narrow(2, first, count)
        result.narrow(2, first, count).copy_(_block(kernel, block, key, value, sight, scale, first))
    return result


def _block(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sight: Sight,
    scale: float,
    first: int,
) -> torch.Tensor:
    rows = query.shape[2]
    low, high = sight.keys(first, rows, key.shape[2])
    if low >= high:
        return output_like(query, value).zero_()
    bias = sight.bias(first, rows, low, high, query)
    return kernel(query, key.narrow(2, low, high - low), value.narrow(2, low, high - low), bias, scale)


def token_major(result: torch.Tensor, query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The result in the layout and dtype every `mom::attention` promises; a copy only if it differs."""
    if result.dtype == query.dtype and result.transpose(1, 2).is_contiguous():
        return result
    return output_like(query, value).copy_(result)


def math_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Two matmuls and a softmax, in float32 at least; the rows of grouped heads share one matmul."""
    batch, heads, rows, channels = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, key.shape[1], -1, channels)
    scores = (grouped @ key.to(wide).transpose(-1, -2)).mul_(scale).view(batch, heads, rows, -1)
    if bias is not None:
        scores += bias
    blind = scores.amax(-1, keepdim=True) == -math.inf
    weights = torch.softmax(scores, dim=-1).masked_fill_(blind, 0.0)
    result = weights.view(batch, key.shape[1], -1, key.shape[2]) @ value.to(wide)
    return result.view(batch, heads, rows, -1).to(query.dtype)


def math_bytes_per_row(query: torch.Tensor, keys: int) -> int:
    """Scores, weights and the softmax between them, in float32 at least."""
    wide = torch.promote_types(query.dtype, torch.float32)
    return 2 * query.shape[0] * query.shape[1] * keys * wide.itemsize
