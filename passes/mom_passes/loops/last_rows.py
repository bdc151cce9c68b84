"""Slices that keep the last rows of a value: the rows that a cache keeps of a window's keys, the last hidden state.

A loop passes the last rows of a value from one mini-sequence to the next anyway, if an operator reads rows ahead of its
own. The final value of that carry is the slice, so the value need not exist at full length:

Before:  k = rope(mm(x, wk)); a = attention(q, k, v, window=128); kept = k[:, :, -127:]
After:   a, kept = loop(...)       each mini-sequence receives the 127 rows of k ahead of its own
"""

from __future__ import annotations

from torch import fx

from mom_passes.graph.sizes import is_one
from mom_passes.graph.strides import storage_order
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import Rows
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.last_rows import rows_kept


def last_rows(node: fx.Node, dims: TokenDims) -> Rows | None:
    """Return `Rows(dim, before=n)` if a node is a slice of the last `n` rows that a carry may return; else None."""
    kept = rows_kept(node, dims)
    return kept if kept is not None and _keeps_its_views(node) else None


def _keeps_its_views(node: fx.Node) -> bool:
    """Whether views of the slice are views of a dense tensor too, or only the caller takes any."""
    value = value_of(operands(node)[0])
    order = [index for index in storage_order(value) if not is_one(value.shape[index])]
    return order == sorted(order) or all(user.op == "output" for user in node.users)
