"""Values in a required dense layout: `mom::copy_rows` always copies, `mom::laid_out` only where the strides differ, and
`mom::join_rows` joins rows with those ahead of them.

A dense layout is given by its `order`: the dimensions from the outermost in storage to the innermost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mom_passes.ops.library import define, implement

COPY_ROWS = define("copy_rows(Tensor rows, int[] order, int? room=None) -> Tensor")
"""A copy of `rows` in its own storage, dense in `order`.

With `room`, the result has one more entry at the start of dimension `room`; that entry is uninitialised.

`clone` does not serve: Inductor removes a `clone` whose result has the strides of its operand.
"""

#: Fewest rows of a copy with room.
LEAST_WITH_ROOM = 32

LAID_OUT = define("laid_out(Tensor(a) value, int[] order) -> Tensor(a)")
"""`value` itself if it is dense in `order`, else a copy that is.

The real result of an operator may have other strides than its fake kernel claims; the result of this operator has not.
"""

JOIN_ROWS = define("join_rows(Tensor ahead, Tensor rows, int dim, int[] order) -> Tensor")
"""`ahead` followed by `rows` along `dim`, dense in `order`.

A loop body must not use `cat` for this: Inductor copies `ahead`, an input of the body, in one of the first kernels, so
that the results of all layers of the body exist at the same time.
"""


def copy_rows(rows: torch.Tensor, order: Sequence[int], room: int | None = None) -> torch.Tensor:
    own = _new_rows(rows, order, room)
    (own if room is None else own.narrow(room, 1, rows.shape[room])).copy_(rows)
    return own


def _new_rows(rows: torch.Tensor, order: Sequence[int], room: int | None = None) -> torch.Tensor:
    shape = list(rows.shape)
    if room is not None:
        shape[room] += 1
    return torch.empty_permuted(shape, list(order), dtype=rows.dtype, device=rows.device)


def laid_out(value: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    step = 1
    for index in reversed(order):
        size = value.shape[index]
        if size != 1 and value.stride(index) != step:
            return copy_rows(value, order)
        step *= size
    return value


def join_rows(ahead: torch.Tensor, rows: torch.Tensor, dim: int, order: Sequence[int]) -> torch.Tensor:
    joined = _joined_rows(ahead, rows, dim, order)
    with torch.no_grad():
        torch.cat([ahead, rows], dim, out=joined)
    return joined


def _joined_rows(ahead: torch.Tensor, rows: torch.Tensor, dim: int, order: Sequence[int]) -> torch.Tensor:
    shape = list(rows.shape)
    shape[dim] += ahead.shape[dim]
    return torch.empty_permuted(shape, list(order), dtype=rows.dtype, device=rows.device)


implement(COPY_ROWS, copy_rows, _new_rows)
implement(LAID_OUT, laid_out, _new_rows)
implement(JOIN_ROWS, join_rows, _joined_rows)
