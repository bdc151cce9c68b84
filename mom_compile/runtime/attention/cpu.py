"""`mom::attention` on the CPU: PyTorch's flash kernel on the keys in sight.

The flash kernel takes grouped heads and returns the log-sum-exp of each row, so that results over
separate keys can be merged exactly. Its own causal mode starts at the first key; rows that stand
further down split their keys so that nothing out of sight is computed and no mask is made:

    causal rows [p, p + r)      keys [0, p) whole            keys [p, p + r) causal
    window w, r < w, p >= w-1   keys [p-w+1, p-w+1+r) causal from the other end (both flipped: row i sees
                                key i and later)   + keys between, whole   + keys [p, p + r) causal

Where keys have conditions, each query mostly sees one range of them (`attention_spans`): padding, packed sequences.
With a mask, or a window too narrow for that, blocks of rows get a bias over the keys in their sight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mom_compile.runtime.attention.rows import (
    Sight,
    in_blocks,
    math_bytes_per_row,
    math_kernel,
    token_major,
    useful_window,
)
from mom_compile.runtime.attention.spans import attention_in_spans
from mom_passes.ops.attention import KeyConditions, output_like

Part = tuple[torch.Tensor, torch.Tensor]

#: Below this window, split keys make more kernel calls than a bias costs.
NARROW_WINDOW = 128
#: Rows in a block of a narrow window: more would compute keys that are out of sight.
NARROW_ROWS = 256

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    start: int,
    is_causal: bool,
    scale: float,
    window: int | None = None,
    keys: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `mom_passes.ops.attention` for shapes and meaning."""
    conditions = KeyConditions(keys, segments, positions)
    ordered = is_causal or positions is not None
    found = attention_in_spans(attention_cpu, query, key, value, mask, start, ordered, scale, window, spans)
    if found is not None:
        return found
    rows, tokens = query.shape[2], key.shape[2]
    if tokens == 0 or 0 in query.shape[:3]:
        return output_like(query, value).zero_()
    window = window if conditions.positions is not None else useful_window(window, start + rows)
    sight = Sight(start, is_causal, window, mask, conditions)
    if not takes_flash(query, key, value):
        return in_blocks(math_kernel, query, key, value, sight, scale, math_bytes_per_row(query, tokens))
    if mask is not None or conditions or not is_causal:
        return in_blocks(flash_kernel, query, key, value, sight, scale, sight.bias_bytes_per_row(query, tokens))
    if window is None:
        return token_major(causal(query, key, value, start, scale), query, value)
    if window <= NARROW_WINDOW or start + rows > tokens:
        row_bytes = sight.bias_bytes_per_row(query, min(tokens, window + NARROW_ROWS))
        return in_blocks(flash_kernel, query, key, value, sight, scale, row_bytes, NARROW_ROWS)
    return windowed(query, key, value, start, window, scale)


def takes_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """The flash kernel wants one head size and a floating dtype it knows. It does not check for empty tensors."""
    return query.dtype in FLASH_DTYPES and query.shape[-1] == value.shape[-1] and query.shape[0] == key.shape[0]


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Part:
    """Result `[B, H, R, D]` and log-sum-exp `[B, H, R]` (float32 at least; 0 for a row that sees nothing)."""
    # The kernel reads channels as if they were adjacent, without a check.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    while bias is not None and bias.dim() != 4:
        bias = bias.unsqueeze(0)
    result, log_sum_exp = FLASH(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
    return result, log_sum_exp


def flash_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return flash(query, key, value, scale, bias=bias)[0]


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """Rows from `start` against keys up to themselves; later keys are never read."""
    rows, keys = query.shape[2], key.shape[2]

    def parts() -> Iterator[Part]:
        if start > 0:
            yield flash(query, key[:, :, :start], value[:, :, :start], scale)
        if start < keys:
            own = slice(start, start + rows)
            yield flash(query, key[:, :, own], value[:, :, own], scale, is_causal=True)

    return merge(parts())


def windowed(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, window: int, scale: float
) -> torch.Tensor:
    """Rows from `start` against the last `window` keys up to themselves, by split keys."""
    rows = query.shape[2]
    result = output_like(query, value)
    # Rows at positions below the window see everything before them.
    unlimited = min(rows, max(0, window - start))
    if unlimited:
        result[:, :, :unlimited] = causal(query[:, :, :unlimited], key, value, start, scale)
    for first in range(unlimited, rows, window - 1):
        block = query[:, :, first : first + window - 1]
        result[:, :, first : first + window - 1] = merge(_window_parts(block, key, value, start + first, window, scale))
    return result


def _window_parts(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, position: int, window: int, scale: float
) -> Iterator[Part]:
    """At most `window - 1` rows at `position >= window - 1`; every part shows each row at least one key."""
    rows = query.shape[2]
    low = position - window + 1
    own, fading, between = slice(position, position + rows), slice(low, low + rows), slice(low + rows, position)
    yield _from_the_other_end(query, key[:, :, fading], value[:, :, fading], scale)
    if between.start < between.stop:
        yield flash(query, key[:, :, between], value[:, :, between], scale)
    yield flash(query, key[:, :, own], value[:, :, own], scale, is_causal=True)


def _from_the_other_end(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Part:
    """Row `i` sees key `i` and later ones: causal, read backwards."""
    result, log_sum_exp = flash(query.flip(2), key.flip(2), value.flip(2), scale, is_causal=True)
    return result.flip(2), log_sum_exp.flip(2)


def merge(parts: Iterator[Part]) -> torch.Tensor:
    """Attention over the union of the parts' keys; at most two results live at a time. In float32 at least."""
    merged, merged_lse = next(parts)
    for result, log_sum_exp in parts:
        merged = merged.to(merged_lse.dtype)
        share = torch.sigmoid(log_sum_exp - merged_lse).unsqueeze(-1)
        merged = merged.lerp_(result.to(merged.dtype), share)
        merged_lse = torch.logaddexp(merged_lse, log_sum_exp)
    return merged
