"""Find keys and values before a model repeated their heads for the query.

Query head `h` of H uses key head `h // (H / G)`: each head is repeated, not the list of heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from mom_passes.attention.products import COPIES
from mom_passes.graph.aliasing import RESHAPES
from mom_passes.graph.arguments import argument, aten, axes, axis
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import all_same, is_one, same
from mom_passes.graph.values import input_node, operand_chain, value_of


def without_repeats(graph: fx.Graph, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Keys and values before repeat_kv, if it repeated both identically."""
    key_source, value_source = _ungrouped(key, 1), _ungrouped(value, 1)
    if key_source is None or value_source is None or not same(key_source.heads, value_source.heads):
        return key, value
    return key_source.emit(graph), value_source.emit(graph)


@dataclass(frozen=True)
class _Grouped:
    """A value before its heads were repeated, and the squeeze and permutations still to apply to it."""

    source: fx.Node
    heads: Any
    permutations: tuple[tuple[int, ...], ...] = ()
    squeeze: int | None = None

    def emit(self, graph: fx.Graph) -> fx.Node:
        node = self.source
        if self.squeeze is not None:
            node = _call(graph, aten.squeeze.dim, node, self.squeeze)
        for order in self.permutations:
            node = _call(graph, aten.permute.default, node, list(order))
        return node


def _call(graph: fx.Graph, target: Any, source: fx.Node, argument: Any) -> fx.Node:
    node = graph.call_function(target, (source, argument))
    node.meta["val"] = target(meta_value(source), argument)
    return node


def _ungrouped(node: fx.Node, heads: int) -> _Grouped | None:
    """The source of a value whose dimension `heads` may be a repetition, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    if node.target in COPIES:
        return _ungrouped(source, heads)
    if node.target is aten.permute.default:
        rank = len(value_of(node).shape)
        order = tuple(axes(argument(node, "dims"), rank))
        found = _ungrouped(source, order[heads])
        if found is None:
            return None
        return _Grouped(found.source, found.heads, (*found.permutations, order), found.squeeze)
    if node.target is aten.expand.default:
        return _expanded(node, source, heads)
    if node.target in RESHAPES:
        return _merged(node, source, heads)
    return None


def _expanded(node: fx.Node, source: fx.Node, heads: int) -> _Grouped | None:
    """One key head for all query heads: `[B, 1, S, D] -> [B, H, S, D]`."""
    wide, narrow = value_of(node).shape, value_of(source).shape
    if len(wide) != len(narrow) or not is_one(narrow[heads]) or not _same_but(wide, narrow, heads):
        return None
    return _Grouped(source, 1)


def _merged(node: fx.Node, source: fx.Node, heads: int) -> _Grouped | None:
    """`[.., G, 1, ..] -> expand [.., G, n, ..] -> view [.., G * n, ..]`."""
    merged, split = value_of(node).shape, value_of(source).shape
    outside = (*split[:heads], *split[heads + 2 :])
    if len(split) != len(merged) + 1 or not all_same(outside, (*merged[:heads], *merged[heads + 1 :])):
        return None
    source = operand_chain(source, lambda value: value.target in COPIES)[-1]
    if source.target is not aten.expand.default:
        return None
    before = input_node(source)
    narrow = value_of(before).shape
    if len(narrow) != len(split) or not is_one(narrow[heads + 1]) or not _same_but(split, narrow, heads + 1):
        return None
    if before.target is aten.unsqueeze.default and axis(argument(before, "dim"), len(narrow)) == heads + 1:
        return _Grouped(input_node(before), split[heads])
    return _Grouped(before, split[heads], squeeze=heads + 1)


def _same_but(a: Any, b: Any, dim: int) -> bool:
    return all_same((*a[:dim], *a[dim + 1 :]), (*b[:dim], *b[dim + 1 :]))
