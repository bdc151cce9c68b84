"""Choice of the kernel that computes an attention on CUDA, by mask, dtype, device and version.

Only `way_of` chooses. Its tests ran on an H200 before TILES existed; times are unknown.

    CUDNN       fp16 and bf16, causal, no mask or window, many keys before the rows: cuDNN for those, flash for the rest
                (`cudnn.py`), where stock PyTorch would prefer cuDNN; also all keys of a latent attention
    FLASH       fp16 and bf16, no mask; grouped heads, windows and causality from the lower right corner are native. It
                is FlashAttention 3 or 4 if activated (`torch.nn.attention.activate_flash_attention_impl`)
    EFFICIENT   the memory-efficient kernel, also float32: causal from the lower right corner by its own mode
    BIAS        the same kernel with a bias for other masks, in blocks of rows
    TILES       our Triton kernel (`tiles.py`), which has never run on a GPU: capped scores, and in half precision masks
                and conditions, e.g. a range of keys per batch entry
    MATH        matmuls and a softmax in blocks of rows, for dtypes and head sizes that no kernel supports

Stock PyTorch prefers cuDNN (torch 2.11 to 2.14, `check_prefer_cudnn_attention` in the CUDA `sdp_utils.cpp`) on compute
capability 9.0, 10.0 or 10.3 with cuDNN later than 9.15.0, unless TORCH_CUDNN_SDPA_DEPRIORITIZED=1. Older cuDNN
versions were wrong for lengths that are not multiples of 128. The priority order cannot be queried: it is set at the
first dispatch. PyTorch itself checks conditions on a call (`can_use_cudnn_attention`): the head size, at most 128 or
256 depending on the version, and whether cuDNN is allowed, which deterministic algorithms forbid.
"""

from __future__ import annotations

import os
from enum import Enum

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import current_flash_attention_impl

from mom_compile.runtime.attention.cudnn import MIN_NUMBERS, ROWS, block_of, blocks_before, keys_keep_their_place
from mom_compile.runtime.attention.tiles import each_its_range, takes_tiles
from mom_passes.ops.attention import AttentionCall

HALF = (torch.float16, torch.bfloat16)

CUDNN_CAPABILITIES = ((9, 0), (10, 0), (10, 3))
#: As in `torch.backends.cudnn.version()`; later versions qualify.
CUDNN_AFTER = 91500


class Way(Enum):
    CUDNN = "cudnn"
    FLASH = "flash"
    EFFICIENT = "efficient"
    BIAS = "bias"
    TILES = "tiles"
    MATH = "math"


def way_of(call: AttentionCall) -> Way:
    """Return the kernel for a call that has rows and keys."""
    if takes_tiles(call) and (call.softcap is not None or each_its_range(call)):
        return Way.TILES
    if call.softcap is not None:
        return Way.MATH
    plain = call.mask is None and not call.has_conditions
    if call.is_causal and call.start + call.rows > call.tokens:
        plain = False  # rows beyond the last key: the kernels' corners do not match their positions
    if plain and takes_flash(call):
        return Way.CUDNN if takes_cudnn(call) else Way.FLASH
    if plain and takes_cudnn_alone(call):
        return Way.CUDNN
    if not takes_efficient(call):
        return Way.MATH
    if (call.mask is not None or call.has_conditions) and call.query.dtype in HALF and takes_tiles(call):
        return Way.TILES
    return Way.EFFICIENT if plain and not (call.is_causal and call.effective_window is not None) else Way.BIAS


def takes_cudnn(call: AttentionCall) -> bool:
    """Whether cuDNN computes a call that flash supports. Cheap checks first: most calls of short prompts fail early."""
    if not call.is_causal or call.effective_window is not None or call.rows % ROWS != 0:
        return False
    if call.query[0].numel() < MIN_NUMBERS:
        return False
    blocks = blocks_before(call.start)
    if not blocks or not prefers_cudnn(call.query.device):
        return False
    if not (keys_keep_their_place(call.key) and keys_keep_their_place(call.value)):
        return False
    return _cudnn_reads(call, *blocks[0], False)


def takes_cudnn_alone(call: AttentionCall) -> bool:
    """Whether cuDNN computes a call that flash does not support, as values are narrower or wider than keys.

    This includes the rows' own keys if they are a square.
    """
    if call.query.dtype not in HALF or call.query.shape[-1] == call.value.shape[-1] or not takes_efficient(call):
        return False
    if not call.is_causal or call.effective_window is not None or call.rows % ROWS != 0:
        return False
    if not prefers_cudnn(call.query.device):
        return False
    if not (keys_keep_their_place(call.key) and keys_keep_their_place(call.value)):
        return False
    blocks = blocks_before(call.start, block_of(call))
    reads = [(low, count, False) for low, count in blocks[:1]]
    if call.start == sum(count for _, count in blocks):
        reads.append((call.start, call.rows, True))
    return bool(reads) and all(_cudnn_reads(call, *one) for one in reads)


def _cudnn_reads(call: AttentionCall, low: int, count: int, is_causal: bool) -> bool:
    key, value = (t.narrow(2, low, count) for t in (call.key, call.value))
    return can_use_cudnn_attention(SDPAParams(call.query, key, value, None, 0.0, is_causal, True))


def prefers_cudnn(device: torch.device) -> bool:
    """Whether stock PyTorch prefers cuDNN to flash. A user who activates another flash implementation wants that."""
    return (
        torch.cuda.get_device_capability(device) in CUDNN_CAPABILITIES
        and (torch.backends.cudnn.version() or 0) > CUDNN_AFTER
        and torch.backends.cuda.cudnn_sdp_enabled()
        and os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") != "1"
        and current_flash_attention_impl() is None
    )


def takes_flash(call: AttentionCall) -> bool:
    """FlashAttention 2: half precision, one head size in multiples of 8 up to 256, Ampere or later."""
    query, key, value = call.query, call.key, call.value
    channels = query.shape[-1]
    return (
        query.dtype in HALF
        and channels == value.shape[-1]
        and channels % 8 == 0
        and channels <= 256
        and all(t.stride(-1) == 1 for t in (query, key, value))
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def takes_efficient(call: AttentionCall) -> bool:
    """Head sizes in multiples of 16 bytes, adjacent in memory, as on all devices. bf16 requires Ampere or later."""
    query, tensors = call.query, (call.query, call.key, call.value)
    return (
        query.dtype in (torch.float32, *HALF)
        and all(t.dtype == query.dtype and t.stride(-1) == 1 for t in tensors)
        and all(t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)
        and (query.dtype is not torch.bfloat16 or torch.cuda.get_device_capability(query.device) >= (8, 0))
    )
