"""PyTorch's flash operator on CUDA, including implementations registered in its place. Its tests ran on an H200.

It works on `[B, tokens, heads, D]`, takes grouped heads and windows, and is causal from the lower right corner.
"""

from __future__ import annotations

import torch

from mom_compile.runtime.attention.merging import Part
from mom_passes.ops.attention import AttentionCall

FLASH = torch.ops.aten._flash_attention_forward.default


def flash(call: AttentionCall) -> Part:
    """Result `[B, H, R, D]`, token-major, and log-sum-exp `[B, H, R]`. If causal, the last row and key align."""
    q, k, v = (t.transpose(1, 2) for t in (call.query, call.key, call.value))
    window = call.effective_window if call.is_causal else None
    # An implementation registered in place of FlashAttention 2 may not support windows: pass one only if there is one.
    window_sizes = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
    result, log_sum_exp, *_ = FLASH(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, call.is_causal, False, scale=call.scale, **window_sizes
    )
    return result.transpose(1, 2), log_sum_exp
