"""`mom::attention` on CUDA. Not yet run on a GPU: written against PyTorch's sources and documentation.

Three ways, fastest first:

    FlashAttention      fp16 and bf16, no mask: grouped heads, windows and lower-right causality natively
    lower-right SDPA    float32 without a mask or window: `torch.nn.attention.bias.causal_lower_right`
    SDPA with a bias    everything else, in blocks of rows

Keys after the last row are cut off first, so that "lower right" is where the rows stand. Where keys have conditions,
each query mostly sees one range of them (`attention_spans`), and the first two ways do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mom_compile.runtime.attention.rows import bias_bytes_per_row, in_blocks, token_major
from mom_compile.runtime.attention.spans import attention_in_spans
from mom_passes.ops.attention import AttentionCall

FLASH = torch.ops.aten._flash_attention_forward.default


def attention_cuda(call: AttentionCall) -> torch.Tensor:
    """See `mom_passes.ops.attention` for shapes and meaning."""
    found = attention_in_spans(attention_cuda, call)
    if found is not None:
        return found
    tokens, end = call.tokens, call.start + call.rows
    if tokens == 0 or 0 in call.query.shape[:3]:
        return call.output().zero_()
    plain = call.mask is None and not call.has_conditions and (end <= tokens or not call.is_causal)
    if call.is_causal and end < tokens:
        call = replace(call, key=call.key[:, :, :end], value=call.value[:, :, :end])  # no more is read of the others
    if plain and takes_flash(call):
        return _flash(call)
    # Once, not for each block of rows.
    call = replace(call, key=_all_heads(call.query, call.key), value=_all_heads(call.query, call.value))
    if plain and call.is_causal and call.felt_window is None:
        bias = causal_lower_right(call.rows, call.tokens)
        result = scaled_dot_product_attention(call.query, call.key, call.value, bias, scale=call.scale)
        return token_major(result, call)
    return in_blocks(_sdpa, call, bias_bytes_per_row(call))


def takes_flash(call: AttentionCall) -> bool:
    """FlashAttention 2: half precision, one head size in multiples of 8 up to 256, Ampere or later."""
    query, key, value = call.query, call.key, call.value
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


def _flash(call: AttentionCall) -> torch.Tensor:
    """The kernel works on `[B, tokens, heads, D]` and is causal from the lower right corner."""
    q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
    window = call.felt_window if call.is_causal else None
    left = None if window is None else window - 1
    right = None if window is None else 0
    sizes = (q.shape[1], k.shape[1])
    result = FLASH(
        q, k, v, None, None, *sizes, 0.0, call.is_causal, False,
        scale=call.scale, window_size_left=left, window_size_right=right,
    )[0]  # fmt: skip
    return token_major(result.transpose(1, 2), call)


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
