"""cuDNN's attention for the keys before a mini-sequence, flash for the keys near it. Its tests ran on an H200.

Rows `[start, start + R)` see all keys before them, where cuDNN is faster, and are causal among themselves. cuDNN's
causal mode only starts at the upper left corner. So the keys are read in parts, merged by their log-sum-exps:

    keys [0, n)             cuDNN, in blocks whose lengths are `BLOCK` times powers of two, the longest first
    keys [n, start + R)     flash, causal from the lower right corner; fewer than `BLOCK` keys and the rows' own

    start = 147,456 = 18 BLOCK: cuDNN for 131,072 and for 16,384 keys, flash for the rows' own

Why these lengths: cuDNN makes a plan for each combination of shapes and strides. A plan reportedly takes tens of
milliseconds; 440 were seen on a B200, with a mask and torch 2.11 (modelscope/FunASR issue 3704). PyTorch keeps all
plans of a thread. The keys before the rows grow with each mini-sequence. For mini-sequences of 2048 rows,

    all keys before at once         a plan for each mini-sequence: 293 for 600,000 tokens, 15 to 130 seconds; 72 for
                                    147,456, 3 to 30 seconds
    blocks of one length            one plan, but 73 parts to merge at 600,000 tokens
    powers of two times `BLOCK`     log2(600,000 / BLOCK) + 1 = 7 plans in a process, at most 3 seconds; 1 to 7 parts

All layers and prompts share the plans: a block gets the strides of a tensor without other keys (`_standalone`).

Why `BLOCK` is 8192: each key costs 4 FLOPs for each of the R x H x D elements of the result. At 350 TFLOPS with flash
and 600 with cuDNN (assumed for an H100, in line with published figures) cuDNN saves 4.8 femtoseconds per key and
element. Another part is read and merged in float32: 24 bytes per element, 7.2 picoseconds at 3.35 TB/s. 1500 keys pay
for that; of what 8192 keys save, merging takes a sixth. Below 8192 keys flash reads them all.

Why a result has at least `MIN_NUMBERS` elements: a part costs the host a dozen operators, an estimated 80 microseconds;
with 2 million elements the shortest block saves as much.

The number of rows is a multiple of `ROWS`. Mini-sequences have such lengths, but few last ones, whose length varies
with the prompt.

Flash does not support values narrower or wider than keys (latent attention, 192 and 128 channels), and the memory-
efficient kernel is reportedly several times slower. There cuDNN reads all it can: blocks from `MLA_BLOCK` keys on, and
the rows' own square by its causal mode; the memory-efficient kernel reads other near keys. That has never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from mom_compile.runtime.attention.efficient import efficient_causal, grouped
from mom_compile.runtime.attention.flash import flash
from mom_compile.runtime.attention.merging import Part, merge
from mom_passes.ops.attention import AttentionCall

CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default

#: Keys of the shortest block, and of the shortest block where flash is not supported.
BLOCK, MLA_BLOCK = 8192, 2048
#: Rows of a kernel tile.
ROWS = 128
#: The fewest elements of a result, R x H x D.
MIN_NUMBERS = 1 << 21


def block_of(call: AttentionCall) -> int:
    """Return the number of keys of the shortest block that cuDNN reads for a call."""
    return BLOCK if call.query.shape[-1] == call.value.shape[-1] else MLA_BLOCK


def blocks_before(start: int, block: int | None = None) -> list[tuple[int, int]]:
    """Return `(first key, count)` of cuDNN's blocks for rows from position `start` on.

    There are none below `block` keys, by default `BLOCK`.
    """
    blocks, low, block = [], 0, block or BLOCK
    while (left := (start - low) // block) > 0:
        count = block << (left.bit_length() - 1)
        blocks.append((low, count))
        low += count
    return blocks


def keys_keep_their_place(keys: torch.Tensor) -> bool:
    """Whether the strides within an entry of `[B, G, T, D]` are independent of T: token-major, as loops make them.

    Otherwise each prompt length would need its own plans.
    """
    return keys.stride(-1) == 1 and (keys.shape[1] == 1 or keys.stride(1) < keys.stride(2))


def in_parts(call: AttentionCall) -> torch.Tensor:
    """Compute a causal call without mask, conditions or window, whose keys end with its last row.

    One batch entry at a time, as the stride between entries depends on the prompt length.
    """
    result = call.output()
    for i in range(call.query.shape[0]):
        q, k, v = (t[i : i + 1] for t in (call.query, call.key, call.value))
        result[i : i + 1].copy_(merge(_parts(replace(call, query=q, key=k, value=v)), call.sinks))
    return result


def _parts(call: AttentionCall) -> Iterator[Part]:
    """The part of the near keys comes first, in float32: each row sees a key in it, its own."""
    blocks = blocks_before(call.start, block_of(call))
    near = sum(count for _, count in blocks)
    own = replace(call, key=call.key[:, :, near:], value=call.value[:, :, near:], start=call.start - near)
    yield _in_float32(*_near(own))
    for low, count in blocks:
        yield _cudnn(call, low, count)


def _near(call: AttentionCall) -> Part:
    """Attention to keys that end with the rows' own, causal from the lower right corner."""
    if call.query.shape[-1] == call.value.shape[-1]:
        return flash(call)
    if call.start == 0:
        return _cudnn(call, 0, call.rows, is_causal=True)
    return grouped(efficient_causal, call.query, call.key, call.value, None, call.scale)


def _in_float32(result: torch.Tensor, log_sum_exp: torch.Tensor) -> Part:
    return result.float(), log_sum_exp


def _cudnn(call: AttentionCall, low: int, count: int, is_causal: bool = False) -> Part:
    """Attention to keys `[low, low + count)`, all of them, or causal for a square. Takes grouped heads.

    The result has the query's layout.
    """
    tensors = (call.query, *(t.narrow(2, low, count) for t in (call.key, call.value)))
    q, k, v = map(_standalone, tensors)
    result, log_sum_exp, *_ = CUDNN(q, k, v, None, True, 0.0, is_causal, False, scale=call.scale)
    return result, log_sum_exp.reshape(q.shape[:3])  # some versions keep a trailing dimension of size 1


def _standalone(one: torch.Tensor) -> torch.Tensor:
    """Return `[1, heads, tokens, D]` with the strides that it has without other data in its storage.

    Only strides of dimensions of size 1 change. PyTorch's key of a plan has all strides.
    """
    _, heads, tokens, channels = one.shape
    token = one.stride(2)
    head = channels if heads == 1 else one.stride(1)
    return one.as_strided(one.shape, (max(heads * head, tokens * token), head, token, 1), one.storage_offset())
