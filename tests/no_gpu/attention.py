"""Attention on CUDA without a GPU: stand-ins for devices and PyTorch's kernels that record calls and allocations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mom_compile.runtime.attention import cuda as attention_cuda
from mom_compile.runtime.attention import cudnn as attention_cudnn
from mom_compile.runtime.attention import efficient as attention_efficient
from mom_compile.runtime.attention import flash as attention_flash
from mom_compile.runtime.attention import tiles as attention_tiles
from mom_compile.runtime.attention import ways
from mom_compile.runtime.attention.efficient import ALIGNED, CAUSAL_LOWER_RIGHT, NOT_MASKED
from mom_passes.ops.attention import AttentionCall, attention_reference, visible


def on_device(
    patch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None = 91900, tiles: bool = False
) -> None:
    """A device with flash, as PyTorch describes it; `cudnn` as `torch.backends.cudnn.version()` gives it. `tiles`: with
    Triton, and so with our own kernel."""
    patch.setattr(attention_tiles, "AVAILABLE", tiles)
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    patch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    patch.setattr(ways, "can_use_cudnn_attention", cudnn_takes)
    patch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)


def kernels_of_pytorch(patch: pytest.MonkeyPatch) -> None:
    """Stand-ins that do what the documentation of PyTorch's kernels, and of ours, states, and require it."""
    patch.setattr(attention_cuda, "attention_in_tiles", in_tiles)
    patch.setattr(attention_flash, "FLASH", flash)
    patch.setattr(attention_efficient, "EFFICIENT", efficient)
    patch.setattr(attention_cudnn, "CUDNN", cudnn)


def in_tiles(call: AttentionCall) -> torch.Tensor:
    return attention_reference(call)


def cudnn_takes(params: Any) -> bool:
    """The checks of torch 2.11 before it calls cuDNN for a dense call without dropout."""
    query, key, value = tensors = (params.query, params.key, params.value)
    latent = (key.shape[-1], value.shape[-1]) == (192, 128)
    assert params.attn_mask is None and params.dropout == 0.0 and params.enable_gqa
    assert not params.is_causal or query.shape[2] == key.shape[2]
    return (
        all(t.dtype in (torch.float16, torch.bfloat16) and t.stride(-1) == 1 for t in tensors)
        and all(t.shape[-1] % 8 == 0 and (t.shape[-1] <= 128 or latent) for t in tensors)
        and query.shape[1] % key.shape[1] == 0
        and key.shape[2] == value.shape[2] > 1
    )


def cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: None, with_sums: bool, dropout: float,
    is_causal: bool, debug: bool, *, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`[B, heads, tokens, D]`; grouped heads; the result has the query's layout, the sums a last dimension of one."""
    assert (bias, with_sums, dropout, debug) == (None, True, 0.0, False)
    assert not is_causal or query.shape[2] == key.shape[2]
    call = AttentionCall(query, key, value, None, 0, is_causal, scale)
    result = attention_reference(call)
    as_the_query = torch.empty_like(query)[..., : result.shape[-1]] if query.shape[-1] >= result.shape[-1] else result
    return as_the_query.copy_(result), log_sum_exp(call).unsqueeze(-1)


def log_sum_exp(call: AttentionCall) -> torch.Tensor:
    """Log-sum-exp of each row, `[B, H, R]`, in float32; for a call without conditions, whose mask is a bias."""
    key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
    scores = (call.query.double() @ key.double().transpose(-1, -2)) * call.scale
    if call.mask is not None:
        scores = scores + call.mask
    if call.is_causal:
        seen = visible(call.rows, call.tokens, call.start, call.window, scores.device)
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.logsumexp(-1).float()


def flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cum_q: None, cum_k: None, max_q: int, max_k: int,
    dropout: float, is_causal: bool, debug: bool, *, scale: float, **sight: int,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`[B, tokens, heads, D]`; causal masks and windows are aligned to the lower right corner."""
    assert (max_q, max_k, dropout, debug) == (query.shape[1], key.shape[1], 0.0, False)
    window = sight["window_size_left"] + 1 if sight else None
    assert not sight or sight["window_size_right"] == 0
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    call = AttentionCall(q, k, v, None, max_k - max_q, is_causal, scale, window)
    return attention_reference(call).transpose(1, 2), log_sum_exp(call)


def efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, cum_q: None, cum_k: None,
    max_q: None, max_k: None, dropout: float, masked: int, with_sums: bool, *, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`[B, tokens, heads, D]`, as many heads of keys as of queries; sums of whole tiles of 32 rows. A row that sees
    nothing is NaN, to be seen, and so is what pads the sums."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    assert all(t.stride(-1) == 1 and t.dtype == query.dtype for t in (query, key, value))
    assert masked in (NOT_MASKED, CAUSAL_LOWER_RIGHT) and not (masked and bias is not None)
    rows, keys = query.shape[1], key.shape[1]
    if bias is not None:
        assert bias.shape == (query.shape[0], query.shape[2], rows, keys) and bias.dtype == query.dtype
        assert bias.stride(-1) == 1 and not any(step % ALIGNED for step in (bias.storage_offset(), *bias.stride()[:-1]))
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    call = AttentionCall(q, k, v, bias, keys - rows, masked == CAUSAL_LOWER_RIGHT, scale)
    made, sums = attention_reference(call), log_sum_exp(call)
    if bias is not None:
        blind = (bias == -torch.inf).all(-1, keepdim=True)
        made, sums = made.masked_fill(blind, torch.nan), sums.masked_fill(blind.squeeze(-1), torch.nan)
    assert with_sums
    return made.transpose(1, 2), torch.nn.functional.pad(sums, (0, -rows % 32), value=torch.nan)


#: Sizes and strides.
Layout = tuple[tuple[int, ...], tuple[int, ...]]


class Calls(TorchDispatchMode):
    """What is called with which layouts; how large the largest tensor is that is made, no view nor an argument; and
    how many bytes of what is made live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.operands: list[tuple[str, tuple[Layout, ...]]] = []
        self.largest = 0
        self.largest_by = ""
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names.add(name)
        self.operands.append((name, tuple((t.shape, t.stride()) for t in args if isinstance(t, torch.Tensor))))
        made = result if isinstance(result, tuple) else (result,)
        for described, value in zip(func._schema.returns, made, strict=False):
            size = value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
            if described.alias_info is None and size > self.largest:
                self.largest, self.largest_by = size, str(func)
            if described.alias_info is None and size:
                storage = value.untyped_storage()
                self._made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made = {at: (ref, size) for at, (ref, size) in self._made.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result
