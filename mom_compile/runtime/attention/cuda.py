"""`mom::attention` on CUDA. Not yet run on a GPU: written against PyTorch's sources and documentation.

Three ways, fastest first:

    FlashAttention      fp16 and bf16, no mask: grouped heads, windows and lower-right causality natively
    lower-right SDPA    float32 without a mask or window: `torch.nn.attention.bias.causal_lower_right`
    SDPA with a bias    everything else, in blocks of rows

Keys after the last row are cut off first, so that "lower right" is where the rows stand. Where keys have conditions,
each query mostly sees one range of them (`attention_spans`), and the first two ways do.
"""

from __future__ import annotations

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mom_compile.runtime.attention.rows import Sight, in_blocks, token_major, useful_window
from mom_compile.runtime.attention.spans import attention_in_spans
from mom_passes.ops.attention import KeyConditions, output_like

FLASH = torch.ops.aten._flash_attention_forward.default


def attention_cuda(
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
    found = attention_in_spans(attention_cuda, query, key, value, mask, start, ordered, scale, window, spans)
    if found is not None:
        return found
    rows, tokens = query.shape[2], key.shape[2]
    if tokens == 0 or 0 in query.shape[:3]:
        return output_like(query, value).zero_()
    window = window if conditions.positions is not None else useful_window(window, start + rows)
    if is_causal and start + rows <= tokens:
        key, value, tokens = key[:, :, : start + rows], value[:, :, : start + rows], start + rows
    lower_right = is_causal and tokens == start + rows
    plain = mask is None and not conditions and (lower_right or not is_causal)
    if plain and takes_flash(query, key, value):
        return _flash(query, key, value, is_causal, scale, window if is_causal else None)
    if plain and is_causal and window is None:
        wide_key, wide_value = _all_heads(query, key), _all_heads(query, value)
        bias = causal_lower_right(rows, tokens)
        return token_major(scaled_dot_product_attention(query, wide_key, wide_value, bias, scale=scale), query, value)
    sight = Sight(start, is_causal, window, mask, conditions)
    wide_key, wide_value = _all_heads(query, key), _all_heads(query, value)  # once, not for each block of rows
    return in_blocks(_sdpa, query, wide_key, wide_value, sight, scale, sight.bias_bytes_per_row(query, tokens))


def takes_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """FlashAttention 2: half precision, one head size in multiples of 8 up to 256, Ampere or later."""
    channels = query.shape[-1]
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and channels == value.shape[-1]
        and channels % 8 == 0
        and channels <= 256
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float, window: int | None
) -> torch.Tensor:
    """The kernel works on `[B, tokens, heads, D]` and is causal from the lower right corner."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    left = None if window is None else window - 1
    right = None if window is None else 0
    sizes = (q.shape[1], k.shape[1])
    result = FLASH(
        q, k, v, None, None, *sizes, 0.0, is_causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip
    return token_major(result.transpose(1, 2), query, value)


def _sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """One block of rows; keys and values have as many heads as the query.

    A row that sees nothing is zeroed: not every kernel behind SDPA does that.
    """
    if bias is None:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    if bias.dtype != query.dtype:
        bias = bias.to(query.dtype)
    result = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    return result.masked_fill(bias.amax(-1, keepdim=True) == -torch.inf, 0.0)


def _all_heads(query: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Key or value heads repeated for each of their query heads, for kernels without grouped heads."""
    group = query.shape[1] // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)
