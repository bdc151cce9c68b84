"""`mom::attention` on CUDA. Its tests ran on an H200; it was written from PyTorch's sources and documentation.

`tests/no_gpu` runs it on tensors without data, which shows calls and allocations, and with stand-ins for PyTorch's
kernels.

`ways.py` chooses the kernel. `flash.py`, `cudnn.py` and `efficient.py` call PyTorch's kernels, `tiles.py` ours.

Keys after the last row are cut off first, so that the lower right corner matches the rows' positions. If keys have
conditions, each query usually sees one range of them (`attention_in_spans`), which kernels without a mask compute.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mom_compile.runtime.attention.cudnn import in_parts
from mom_compile.runtime.attention.efficient import (
    bytes_of_aligned,
    efficient,
    efficient_causal,
    efficient_grouped,
    grouped,
)
from mom_compile.runtime.attention.flash import flash
from mom_compile.runtime.attention.merging import merge
from mom_compile.runtime.attention.rows import (
    bias_bytes_per_row,
    in_blocks,
    in_blocks_of_products,
    token_major,
)
from mom_compile.runtime.attention.spans import attention_in_spans
from mom_compile.runtime.attention.tiles import attention_in_tiles, each_its_range, takes_tiles
from mom_compile.runtime.attention.ways import Way, way_of
from mom_passes.ops.attention import AttentionCall


def attention_cuda(call: AttentionCall) -> torch.Tensor:
    """See `mom_passes.ops.attention` for shapes and meaning."""
    ranges = takes_tiles(call) and each_its_range(call)  # one launch for all entries
    found = None if ranges else attention_in_spans(attention_cuda, call)
    if found is not None:
        return found
    tokens, end = call.tokens, call.start + call.rows
    if tokens == 0 or 0 in call.query.shape[:3]:
        return call.output().zero_()
    way = way_of(call)
    if way is Way.TILES:
        found = attention_in_tiles(call)
        return attention_cuda(call) if found is None else found  # with another kernel
    if call.is_causal and end < tokens:
        key, value = (t.narrow(2, 0, end) for t in (call.key, call.value))  # later keys are not read
        call = replace(call, key=key, value=value)
    if way is Way.FLASH:
        return token_major(merge([flash(call)], call.sinks), call)
    if way is Way.CUDNN:
        return in_parts(call)
    if way is Way.EFFICIENT:
        kernel = efficient_causal if call.is_causal else efficient
        part = grouped(kernel, call.query, call.key, call.value, None, call.scale)
        return token_major(merge([part], call.sinks), call)
    if way is Way.BIAS:
        return in_blocks(efficient_grouped, call, max(bias_bytes_per_row(call), bytes_of_aligned(call)))
    return in_blocks_of_products(call)
