"""`mom::attention` on the CPU: PyTorch's flash kernel on the keys in sight.

The flash kernel takes grouped heads and returns the log-sum-exp of each row, so that results over separate keys can be
merged exactly. Its causal mode starts at the first key. For later rows the keys are split, so that no key out of sight
is read and no mask is made:

    causal rows [p, p + r)      keys [0, p) whole            keys [p, p + r) causal
    window w, r < w, p >= w-1   keys [p-w+1, p-w+1+r) causal in reverse (both flipped: row i sees key i and later)
                                + keys between, whole        + keys [p, p + r) causal

If all rows see all keys, grouped heads are treated as more rows of one head: the kernel uses larger blocks then.

If keys have conditions, each query usually sees one range of them (`spans.py`): padding, packed sequences. With a mask,
or a window too narrow for splitting, blocks of rows get a bias over the keys in their sight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mom_compile.runtime.attention.merging import Part, merge
from mom_compile.runtime.attention.rows import (
    bias_bytes_per_row,
    in_blocks,
    in_blocks_of_products,
    keys_in_sight,
    token_major,
)
from mom_compile.runtime.attention.spans import attention_in_spans
from mom_passes.ops.attention import AttentionCall

#: Windows up to this size, or this multiple of the call's rows, use a bias: splitting keys would cost more in copies
#: and calls. With 512 rows on 2 cores, a bias takes 0.66 to 0.85 of the time for windows of 64 to 1024 keys, and 1.27
#: of it for 4096.
NARROW_WINDOW, NARROW_FOR_ROWS = 128, 2
#: Rows of a block with a bias: more rows would read keys out of sight, fewer are slower for the kernel.
NARROW_ROWS = 128

#: The kernel uses blocks of 64 and 256 rows, instead of 32, from this many rows of a head on. Over 8192 keys in 2 heads
#: on 2 cores, 8 heads of 256 rows take 0.81 of the time as 2 heads of 1024 rows; 512 rows 0.82, 768 rows 0.96.
MIDDLE_BLOCKS, LARGE_BLOCKS, LARGEST_BLOCK = 192, 768, 256

#: The fewest keys of a part in a decode step. With fewer, starting a thread takes longer than the part.
FEWEST_KEYS = 512

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
FLASH_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def attention_cpu(call: AttentionCall) -> torch.Tensor:
    """See `mom_passes.ops.attention` for shapes and meaning."""
    found = attention_in_spans(attention_cpu, call)
    if found is not None:
        return found
    tokens = call.tokens
    if tokens == 0 or 0 in call.query.shape[:3]:
        return call.output().zero_()
    if not takes_flash(call):
        return in_blocks_of_products(call)
    if call.rows == 1 and call.mask is None and not call.has_conditions:
        return one_row(call)
    if call.mask is not None or call.has_conditions or not call.is_causal:
        return in_blocks(flash_kernel, call, bias_bytes_per_row(call))
    window = call.effective_window
    if window is None:
        return token_major(causal(call), call)
    narrow = window <= max(NARROW_WINDOW, NARROW_FOR_ROWS * call.rows)
    if narrow or call.start + call.rows > tokens:
        row_bytes = bias_bytes_per_row(call, min(tokens, window + NARROW_ROWS))
        return in_blocks(flash_kernel, call, row_bytes, NARROW_ROWS)
    return windowed(call, window)


def takes_flash(call: AttentionCall) -> bool:
    """Whether the flash kernel supports the call: one head size, a floating dtype and no capped scores. It does not
    check for empty tensors."""
    query, key = call.query, call.key
    if call.softcap is not None:
        return False
    return query.dtype in FLASH_DTYPES and query.shape[-1] == call.value.shape[-1] and query.shape[0] == key.shape[0]


def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    is_causal: bool = False,
    bias: torch.Tensor | None = None,
) -> Part:
    """Return result `[B, H, R, D]` and log-sum-exp `[B, H, R]` (at least float32; 0 for a row that sees nothing)."""
    # The kernel assumes adjacent channels without a check.
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    while bias is not None and bias.dim() != 4:
        bias = bias.unsqueeze(0)
    result, log_sum_exp = FLASH(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)
    return result, log_sum_exp


def flash_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> Part:
    return flash(query, key, value, scale, bias=bias)


def one_row(call: AttentionCall) -> torch.Tensor:
    """A decode step: its one row sees all keys in its sight, so no mask is needed."""
    low, high = keys_in_sight(call)
    if low >= high:
        return call.output().zero_()
    return token_major(merge(_split(call, low, high), call.sinks), call)


def _split(call: AttentionCall, low: int, high: int) -> Iterator[Part]:
    """Split keys `[low, high)` of one row of one sequence into parts, so that all threads have work."""
    batch, heads = call.key.shape[:2]
    parts = min(-(-torch.get_num_threads() // (batch * heads)), (high - low) // FEWEST_KEYS)
    if batch > 1 or parts < 2:
        yield _whole(call, low, high)
        return
    size = (high - low) // parts
    rows = call.query.unflatten(1, (heads, -1)).flatten(2, 3).expand(parts, -1, -1, -1)
    # A part is a batch entry: a view, since there is one sequence.
    split = slice(low, low + parts * size)
    key, value = (t[0, :, split].unflatten(1, (parts, size)).transpose(0, 1) for t in (call.key, call.value))
    found, log_sum_exp = flash(rows, key, value, call.scale)
    for part in range(parts):
        yield found[part].flatten(0, 1)[None, :, None], log_sum_exp[part].flatten()[None, :, None]
    if low + parts * size < high:
        yield _whole(call, low + parts * size, high)


def causal(call: AttentionCall) -> torch.Tensor:
    """Attention of rows to keys up to their own position; later keys are not read."""

    def parts() -> Iterator[Part]:
        if call.start > 0:
            yield _whole(call, 0, call.start)
        if call.start < call.tokens:
            yield _part(call, call.start, call.start + call.rows, is_causal=True)

    return merge(parts(), call.sinks)


def windowed(call: AttentionCall, window: int) -> torch.Tensor:
    """Attention of rows to the last `window` keys up to their own position, by split keys."""
    rows = call.rows
    result = call.output()
    # Rows at positions below the window see everything before them.
    unlimited = min(rows, max(0, window - call.start))
    if unlimited:
        result[:, :, :unlimited] = causal(call.of_rows(0, unlimited))
    for first in range(unlimited, rows, window - 1):
        count = min(window - 1, rows - first)
        parts = _window_parts(call.of_rows(first, count), window)
        result[:, :, first : first + count] = merge(parts, call.sinks)
    return result


def _window_parts(call: AttentionCall, window: int) -> Iterator[Part]:
    """Parts of at most `window - 1` rows at positions from `window - 1` on. Each row sees a key of each part."""
    position, rows = call.start, call.rows
    low = position - window + 1
    leaving = slice(low, low + rows)  # keys that leave the window within these rows
    yield _reverse_causal(call.query, call.key[:, :, leaving], call.value[:, :, leaving], call.scale)
    if low + rows < position:
        yield _whole(call, low + rows, position)
    yield _part(call, position, position + rows, is_causal=True)


def _whole(call: AttentionCall, low: int, high: int) -> Part:
    """Attention to keys `[low, high)`, all of which every row sees."""
    grouped = call.query.shape[1] // call.key.shape[1]
    if not _gains_rows(call, grouped):
        return _part(call, low, high)
    rows = call.query.unflatten(1, (-1, grouped)).flatten(2, 3)
    found, log_sum_exp = flash(rows, call.key[:, :, low:high], call.value[:, :, low:high], call.scale)
    del rows
    result = call.output()
    result.unflatten(1, (-1, grouped)).copy_(found.unflatten(2, (grouped, -1)))
    return result, log_sum_exp.unflatten(2, (grouped, -1)).flatten(1, 2)


def _gains_rows(call: AttentionCall, grouped: int) -> bool:
    """Whether treating heads that share keys as rows gives larger blocks, and still enough blocks for all threads.

    A single row is one block: the keys of a head are then read once instead of once per head that shares them.
    """
    batch, heads = call.key.shape[:2]
    if call.rows == 1:
        return grouped > 1
    blocks = batch * heads * math.ceil(grouped * call.rows / LARGEST_BLOCK)
    larger = grouped > 1 and call.rows < LARGE_BLOCKS and grouped * call.rows >= MIDDLE_BLOCKS
    return larger and blocks >= 2 * torch.get_num_threads()


def _part(call: AttentionCall, low: int, high: int, is_causal: bool = False) -> Part:
    """Attention to keys `[low, high)`, all of them or causal from the first."""
    return flash(call.query, call.key[:, :, low:high], call.value[:, :, low:high], call.scale, is_causal)


def _reverse_causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> Part:
    """Row `i` sees key `i` and later ones: causal attention with rows and keys flipped."""
    result, log_sum_exp = flash(query.flip(2), key.flip(2), value.flip(2), scale, is_causal=True)
    return result.flip(2), log_sum_exp.flip(2)
