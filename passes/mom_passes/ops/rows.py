"""Values in a layout of our choice: `mom::copy_rows` in a storage of their own, `mom::laid_out` where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mom_passes.ops.library import LIBRARY

#: A dense layout is its `order`: the dimensions from the outermost in storage to the innermost.
LIBRARY.define("copy_rows(Tensor rows, int[] order, int? room=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
"""Rows in a storage of their own, dense in `order`. With `room`, they lie behind a row that has no values yet, in that
dimension, and the result has that row, too.

An operator of its own, since Inductor takes a `clone` whose strides are its source's for nothing and drops it.
"""

COPY_ROWS = torch.ops.mom.copy_rows.default

LIBRARY.define("laid_out(Tensor(a) value, int[] order) -> Tensor(a)", tags=(torch.Tag.pt2_compliant_tag,))
"""A value that is dense in `order`: itself where it lies so, else a copy.

What an operator really returns may have other strides than its fake kernel claims. Behind this operator it has not.
"""

LAID_OUT = torch.ops.mom.laid_out.default


def copy_rows(rows: torch.Tensor, order: Sequence[int], room: int | None = None) -> torch.Tensor:
    own = _new_rows(rows, order, room)
    (own if room is None else own.narrow(room, 1, rows.shape[room])).copy_(rows)
    return own


@torch.library.register_fake("mom::copy_rows", lib=LIBRARY)
def _new_rows(rows: torch.Tensor, order: Sequence[int], room: int | None = None) -> torch.Tensor:
    shape = list(rows.shape)
    if room is not None:
        shape[room] += 1
    return torch.empty_permuted(shape, list(order), dtype=rows.dtype, device=rows.device)


LIBRARY.impl("copy_rows", copy_rows, "CompositeExplicitAutograd")


def laid_out(value: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    step = 1
    for index in reversed(order):
        size = value.shape[index]
        if size != 1 and value.stride(index) != step:
            return copy_rows(value, order)
        step *= size
    return value


@torch.library.register_fake("mom::laid_out", lib=LIBRARY)
def _laid_out_fake(value: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    return torch.empty_permuted(value.shape, list(order), dtype=value.dtype, device=value.device)


LIBRARY.impl("laid_out", laid_out, "CompositeExplicitAutograd")
