"""Choose the attentions in a window whose keys and values are passed on inside a loop instead of kept at full length.

Terms
-----
window layer    A causal `mom.attention` with `window=w` over the rows of its own sequence.
by rows         The call has the argument `first`: its rows need the `w - 1` keys and values ahead of them, which each
                mini-sequence passes to the next. The layer is no barrier and shares a loop with its neighbours.
barrier         The call needs all keys and values. Those of two layers exist at full length at a time: what an
                attention reads, and what the loop writes for the next layer.
run             Window layers by rows with no barrier between them. They are in one loop, so their carries exist at the
                same time, in two buffers each.
last queries    A window layer of which only the last rows are needed. It reads the last keys and values only.

    for each attention, in graph order:
        a window layer is by rows if
            its window is at most `MOST_MINI_SEQUENCES` of the shortest mini-sequences   (time: see the constant)
            the run with this layer carries at most what one layer keeps at full length  (bytes)
        any other attention ends the run

A window layer that would make a run carry too much is a barrier, and a new run begins after it. No layer is by rows if
weights are on the host: the layers of a run need their weights at the same time.

Before:  a = attention(q, k, v, None, 0, True, scale, 128)
After:   a = attention(q, k, v, None, 0, True, scale, 128, first=0)

Before:  a = attention(q[:, :, -1:], k, v, None, S - 1, True, scale, 128)
After:   k1, v1 = last_rows(zeros, k), last_rows(zeros, v)                                       128 rows
         a = attention(q[:, :, -1:], k1, v1, None, S - 1, True, scale, 128, first=S - 128)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

from mom_passes.graph.arguments import argument, argument_node, replace
from mom_passes.graph.edit import size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, count_hint, expr, hint, same
from mom_passes.graph.values import value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.transfers import ARRIVING
from mom_passes.rules import Dim
from mom_passes.rules.attention import QUERY
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.last_rows import emit_last_rows

#: A window has at most so many times the rows of the shortest mini-sequences. Each mini-sequence copies the keys and
#: values ahead twice. CPU time of the copies relative to attention and a gated MLP of four times the width, on one
#: thread, float32, heads of 128 channels, mini-sequences of 128 rows (of 256 rows: 0.4 to 0.9 of this):
#:
#:     window               128     512    1024    2048    4096
#:     4 heads, 1 key head  0.7 %   1.2 %   1.4 %   3.4 %   4.7 %
#:     8 heads, 8 key heads 1.4 %   2.7 %   4.4 %   8.4 %  14.2 %
MOST_MINI_SEQUENCES = 8

#: Buffers of a carry: a mini-sequence reads one and writes the other.
BUFFERS = 2


@dataclass(frozen=True)
class WindowKeys:
    """The token dimensions, the calls by rows, the calls of last queries, and how many window layers stay barriers."""

    dims: TokenDims
    by_rows: tuple[fx.Node, ...] = ()
    last_queries: tuple[fx.Node, ...] = ()
    barriers: int = 0


def window_keys(gm: fx.GraphModule, dims: TokenDims, rows: int) -> WindowKeys:
    """Rewrite the chosen calls in place.

    Parameters
    ----------
    gm : fx.GraphModule
        A graph without loops.
    dims : TokenDims
        Its token dimensions.
    rows : int
        The rows of the shortest mini-sequences of a loop.

    Returns
    -------
    WindowKeys
        The chosen calls.
    """
    layers = [node for node in gm.graph.nodes if is_window_layer(node, dims)]
    if any(node.target in ARRIVING for node in gm.graph.nodes):
        return WindowKeys(dims, barriers=len(layers))
    last = [node for node in layers if not _has_all_queries(node, dims)]
    last = [node for node in last if BUFFERS * _rows_of_last_queries(node) <= hint(_length(node, dims))]
    by_rows = _by_rows(gm, dims, [node for node in layers if _has_all_queries(node, dims)], rows)
    for node in by_rows:
        node.args, node.kwargs = replace(node.target, node.args, node.kwargs, first=0)
    new = {n: "keeps the last rows" for node in last for n in _read_last_keys(node, dims)}
    dims = dataclasses.replace(dims, mixing={**dims.mixing, **new})
    return WindowKeys(dims, tuple(by_rows), tuple(last), len(layers) - len(by_rows) - len(last))


def _by_rows(gm: fx.GraphModule, dims: TokenDims, layers: Collection[fx.Node], rows: int) -> list[fx.Node]:
    """Return the window layers that are chosen to be by rows."""
    chosen: list[fx.Node] = []
    carried = 0
    for node in gm.graph.find_nodes(op="call_function", target=MOM_ATTENTION):
        if node not in layers:
            carried = 0
            continue
        window, per_token = argument(node, "window"), _bytes_per_token(node)
        carried += BUFFERS * (window - 1) * per_token
        if window <= MOST_MINI_SEQUENCES * rows and carried <= hint(_length(node, dims)) * per_token:
            chosen.append(node)
        else:
            carried = 0
    return chosen


def is_window_layer(node: fx.Node, dims: TokenDims) -> bool:
    """Whether a node is a causal attention in a window of token indices, without any other mask, over keys and values
    that a loop computes. Its queries are the last rows of the sequence, or all.

    Not a chunk of queries against a longer cache, nor a window by given positions (`is_causal` is false there).
    """
    if node.target is not MOM_ATTENTION or not argument(node, "is_causal") or argument(node, "window") is None:
        return False
    if argument(node, "mask") is not None or argument(node, "first") is not None:
        return False
    key, value = keys_and_values = [argument_node(node, name) for name in ("key", "value")]
    if not all(n in dims.rowwise and n in dims.worked and dims.carriers[n].dim == Dim(QUERY) for n in keys_and_values):
        return False
    tokens = [value_of(n).shape[QUERY] for n in (key, value)]
    end = _number(argument(node, "start")) + expr(value_of(argument_node(node, "query")).shape[QUERY])
    return all(same(size, _length(node, dims)) for size in (*tokens, end))


def _length(node: fx.Node, dims: TokenDims) -> Size:
    """Return the number of tokens of an attention's keys."""
    return dims.carriers[argument_node(node, "key")].length


def _has_all_queries(node: fx.Node, dims: TokenDims) -> bool:
    return same(value_of(argument_node(node, "query")).shape[QUERY], _length(node, dims))


def _number(start: Any) -> sympy.Expr:
    return expr(meta_value(start) if isinstance(start, fx.Node) else start)


def _rows_of_last_queries(node: fx.Node) -> int:
    """Return how many keys the last queries see together."""
    return int(argument(node, "window")) - 1 + hint(value_of(argument_node(node, "query")).shape[QUERY])


def _read_last_keys(node: fx.Node, dims: TokenDims) -> list[fx.Node]:
    """Let an attention of the last queries read the last keys and values, with zeros ahead if there are fewer. Return
    the new nodes that have no rows."""
    rows, changes = _rows_of_last_queries(node), dict[str, Any]()
    for name in ("key", "value"):
        source = argument_node(node, name)
        shape = list(value_of(source).shape)
        shape[QUERY] = rows
        changes[name] = emit_last_rows(node, source, QUERY, shape)
    with node.graph.inserting_before(node):
        first = size_node(node.graph, expr(_length(node, dims)) - rows, node)
    new = list(changes.values())
    node.args, node.kwargs = replace(node.target, node.args, node.kwargs, **changes, first=first)
    return new


def _bytes_per_token(node: fx.Node) -> int:
    """Return the bytes of a token's keys and values, at the captured sizes."""
    read = [meta_value(argument_node(node, name)) for name in ("key", "value")]
    return sum(count_hint(value.shape) * value.element_size() // max(1, hint(value.shape[QUERY])) for value in read)
