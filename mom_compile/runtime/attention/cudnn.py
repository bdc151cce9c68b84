"""cuDNN's attention for the keys before a mini-sequence, flash for what is near it. Its tests ran on an H200.

Rows `[start, start + R)` see the keys before them whole, which is what cuDNN is faster at, and are causal in their own,
which its operator is from the upper left corner alone. So the keys are read in parts, merged by their log-sum-exps:

    keys [0, n)             cuDNN, in blocks whose lengths are `BLOCK` times powers of two, the longest first
    keys [n, start + R)     flash, causal from the lower right corner; fewer than `BLOCK` keys and the rows' own

    start = 147,456 = 18 BLOCK: cuDNN for 131,072 and for 16,384 keys, flash for the rows' own

Why such lengths. cuDNN plans for each shape and its strides: said to take tens of milliseconds, seen to take 440 on a
B200, with a mask and torch 2.11 (modelscope/FunASR issue 3704). PyTorch keeps all plans of a thread. The keys before
grow by a mini-sequence each time. With mini-sequences of 2048 rows,

    all keys before at once         a plan for each mini-sequence: 293 for 600,000 tokens, 15 to 130 seconds; 72 for
                                    147,456, 3 to 30 seconds
    blocks of one length            one plan, but 73 parts to merge at 600,000 tokens
    powers of two times `BLOCK`     log2(600,000 / BLOCK) + 1 = 7 plans in a process, at most 3 seconds; 1 to 7 parts

all layers and prompts have the same: the strides of a block are made those of keys that are alone (`_alone`).

Why `BLOCK` is 8192. For each of the R x H x D numbers of a result, a key takes 4 FLOPs; at 350 TFLOPS with flash and
600 with cuDNN, assumed for an H100 and in keeping with what is reported, cuDNN saves 4.8 femtoseconds of that. Another
part is read and merged in float32: 24 bytes for each number, 7.2 picoseconds at 3.35 TB/s. 1500 keys pay for it; of
what 8192 save, merging takes a sixth. Below 8192 keys nothing changes: flash reads them all.

Why a result has at least `NUMBERS`. A part takes the host a dozen operators, by estimate 80 microseconds; for 2 million
numbers the shortest block saves as much.

Rows are whole multiples of `ROWS`: mini-sequences are, and of the lengths of last ones, of which every prompt may have
another, few are.

Values that are not as wide as keys (latent attention, 192 and 128 channels) flash does not take, and the memory-
efficient kernel is said to be several times slower. There cuDNN reads all that it can: blocks from `ALONE` keys on, and
the rows' own, a square, by its causal mode; the memory-efficient kernel reads near keys that are no square. That has
never run on a GPU.
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

#: Keys of the shortest block, and where flash takes none.
BLOCK, ALONE = 8192, 2048
#: Rows of a tile of the kernels.
ROWS = 128
#: Of a result, R x H x D.
NUMBERS = 1 << 21


def block_of(call: AttentionCall) -> int:
    """Keys of the shortest block that cuDNN reads for a call."""
    return BLOCK if call.query.shape[-1] == call.value.shape[-1] else ALONE


def blocks_before(start: int, block: int | None = None) -> list[tuple[int, int]]:
    """`(first key, count)` of the blocks that cuDNN reads for rows that stand at `start`; none below `block` keys, or
    `BLOCK`."""
    blocks, low, block = [], 0, block or BLOCK
    while (left := (start - low) // block) > 0:
        count = block << (left.bit_length() - 1)
        blocks.append((low, count))
        low += count
    return blocks


def keys_keep_their_place(keys: torch.Tensor) -> bool:
    """Whether strides within an entry of `[B, G, T, D]` say nothing of how many keys there are: token-major, as loops
    make them. Otherwise each length of a prompt would have plans of its own."""
    return keys.stride(-1) == 1 and (keys.shape[1] == 1 or keys.stride(1) < keys.stride(2))


def in_parts(call: AttentionCall) -> torch.Tensor:
    """A causal call without mask, conditions or window, whose keys end with its last row. One entry of the batch at a
    time: the distance between two is that of a prompt's length."""
    result = call.output()
    for i in range(call.query.shape[0]):
        q, k, v = (t[i : i + 1] for t in (call.query, call.key, call.value))
        result[i : i + 1].copy_(merge(_parts(replace(call, query=q, key=k, value=v)), call.sinks))
    return result


def _parts(call: AttentionCall) -> Iterator[Part]:
    """The near keys' comes first, in float32, before another is made: there each row sees a key, itself."""
    blocks = blocks_before(call.start, block_of(call))
    near = sum(count for _, count in blocks)
    own = replace(call, key=call.key[:, :, near:], value=call.value[:, :, near:], start=call.start - near)
    yield _in_float32(*_near(own))
    for low, count in blocks:
        yield _cudnn(call, low, count)


def _near(call: AttentionCall) -> Part:
    """Keys that end with the rows' own, causal from the lower right corner."""
    if call.query.shape[-1] == call.value.shape[-1]:
        return flash(call)
    if call.start == 0:
        return _cudnn(call, 0, call.rows, is_causal=True)
    return grouped(efficient_causal, call.query, call.key, call.value, None, call.scale)


def _in_float32(result: torch.Tensor, log_sum_exp: torch.Tensor) -> Part:
    return result.float(), log_sum_exp


def _cudnn(call: AttentionCall, low: int, count: int, is_causal: bool = False) -> Part:
    """Keys `[low, low + count)`, seen by every row, or of a square the causal half. Grouped heads as they are; the
    result is laid out as the query."""
    tensors = (call.query, *(t.narrow(2, low, count) for t in (call.key, call.value)))
    q, k, v = map(_alone, tensors)
    result, log_sum_exp, *_ = CUDNN(q, k, v, None, True, 0.0, is_causal, False, scale=call.scale)
    return result, log_sum_exp.reshape(q.shape[:3])  # some versions keep a last dimension of one


def _alone(one: torch.Tensor) -> torch.Tensor:
    """`[1, heads, tokens, D]`, the same values, with the strides over dimensions of one that it has if there is nothing
    else in its storage: PyTorch keeps plans by all strides."""
    _, heads, tokens, channels = one.shape
    token = one.stride(2)
    head = channels if heads == 1 else one.stride(1)
    return one.as_strided(one.shape, (max(heads * head, tokens * token), head, token, 1), one.storage_offset())
