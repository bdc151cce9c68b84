"""Compute the last few rows of a value in the loop that computes all of them, so that no row is stored only for them.

Before:  y = mul(x, gate); last = y[:, S - 1 : S]              y at full length, for one row
After:   y = mul(x, gate); last = last_rows(zeros(B, 1, H), y)     a carry of one row

Such slices are the hidden states of the last token, and values of a last layer that needs them for that token only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from mom_passes.graph.arguments import argument, aten
from mom_passes.graph.claimed_layouts import correct_strides
from mom_passes.graph.edit import copy_graph, emit, size_node
from mom_passes.graph.sizes import Size, same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.convolution import LAST_ROWS
from mom_passes.rules import Rows
from mom_passes.tokens.demanded_rows import span_of
from mom_passes.tokens.dims import TokenDims

#: At most so many rows are handed from one mini-sequence to the next.
MOST_ROWS = 64


def last_rows(gm: fx.GraphModule, dims: TokenDims) -> fx.GraphModule:
    """Return a new graph without slices that take the last few rows of a computed value, or the same graph if there are
    none."""
    names = [node.name for node in gm.graph.nodes if _takes_last_rows(node, dims)]
    if not names:
        return gm
    copied = copy_graph(gm)
    by_name = {node.name: node for node in copied.graph.nodes}
    correct_strides(copied, [_replace(by_name[name]) for name in names])
    copied.recompile()
    return copied


def rows_kept(node: fx.Node, dims: TokenDims) -> Rows | None:
    """Return `Rows(dim, before=n)` if a node is a slice of the last `n` rows of a value that a loop computes."""
    if node.target is not aten.slice.Tensor:
        return None
    (source,) = operands(node)
    carrier = dims.carriers.get(source)
    if carrier is None or source not in dims.rowwise or source not in dims.worked:
        return None
    span = span_of(node, carrier.dim, carrier.length)
    count = value_of(node).shape[carrier.dim.index]
    last = span is not None and same(span.end, carrier.length)
    return Rows(carrier.dim, count) if last and isinstance(count, int) else None


def emit_last_rows(before: fx.Node, source: fx.Node, dim: int, shape: Sequence[Size]) -> fx.Node:
    """Emit `mom::last_rows` of a value ahead of a node, with zeros ahead of the first row. `shape` is the result's."""
    graph, value = source.graph, value_of(source)
    with graph.inserting_before(before):
        sizes = [size_node(graph, size, before) for size in shape]
        options: Any = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
        zeros = emit(graph, aten.full.default, (sizes, 0), options)
        return emit(graph, LAST_ROWS, (zeros, source, dim))


def _takes_last_rows(node: fx.Node, dims: TokenDims) -> bool:
    # The rows that a cache keeps of a window are final values of carries that exist anyway (`loops.last_rows`).
    if any(user.op == "output" for user in node.users):
        return False
    kept = rows_kept(node, dims)
    return kept is not None and kept.before <= MOST_ROWS


def _replace(node: fx.Node) -> fx.Node:
    (source,) = operands(node)
    graph = node.graph
    rows = emit_last_rows(node, source, argument(node, "dim"), value_of(node).shape)
    rows.meta = {**node.meta, "val": rows.meta["val"]}
    node.replace_all_uses_with(rows)
    graph.erase_node(node)
    return rows
