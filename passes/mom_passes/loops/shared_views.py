"""Find the views that must share storage with their source. An analysis.

A view of some channels or heads is computed row by row like other values and may have storage of its own, so that the
rest of its source need not exist. A view must share storage if a caller or an operator can see the difference:

    outputs that overlap                    a write to one changes the other
    operands of an external operator        it must get the strides that it gets in eager mode

Terms
-----
chain      The value that owns a storage, a view of it, a view of that view, ..., up to a given value.
disjoint   Two outputs with one storage and no common element: items of a split, ranges of a dimension.

    for each storage, outputs that are not disjoint    -> the views that are in only one of their chains
    for each operand of an external operator           -> the views of its chain
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence

import torch
from torch import fx

from mom_passes.graph.aliasing import is_a_view
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import operand_chain, operands, value_of
from mom_passes.rules import Dim, has_own_rule
from mom_passes.rules.views import is_cut
from mom_passes.tokens.demanded_rows import span_of
from mom_passes.torch_compat import is_from_elsewhere


def shared_views(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """Return the views of a graph that must not have storage of their own."""
    found = _views_of_outputs(gm.graph.output_node())
    for node in gm.graph.nodes:
        if is_from_elsewhere(node.target) and not has_own_rule(node.target):
            for operand in operands(node):
                found.update(_chain(operand)[1:])
    return frozenset(found)


def _views_of_outputs(output: fx.Node) -> set[fx.Node]:
    """Return the views that are in only one of the chains of two overlapping outputs."""
    by_storage: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in output.all_input_nodes:
        if isinstance(meta_value(node), torch.Tensor):
            chain = _chain(node)
            by_storage.setdefault(chain[0], []).append(chain)
    found: set[fx.Node] = set()
    for chains in by_storage.values():
        for one, other in itertools.combinations(chains, 2):
            if not _are_disjoint(one, other):
                found.update(set(one) ^ set(other))
    return found


def _chain(node: fx.Node) -> list[fx.Node]:
    """Return the chain of views from the owner of the storage to a node."""
    return operand_chain(node, is_a_view)[::-1]


def _are_disjoint(one: Sequence[fx.Node], other: Sequence[fx.Node]) -> bool:
    """Whether the last views of two chains are known to have no common element."""
    for a, b in zip(one, other, strict=False):
        if not (a is b or _is_same_view(a, b)):
            return _are_disjoint_cuts(a, b)
    return False


def _is_same_view(a: fx.Node, b: fx.Node) -> bool:
    """Whether two views of equal values are equal."""
    return a.target == b.target and a.args[1:] == b.args[1:] and a.kwargs == b.kwargs


def _are_disjoint_cuts(a: fx.Node, b: fx.Node) -> bool:
    if a.target is b.target is operator.getitem:
        return True  # different items of a split
    if not (is_cut(a) and is_cut(b)):
        return False
    (source,), rank = operands(a), value_of(operands(a)[0]).dim()
    dim = Dim(axis(argument(a, "dim"), rank))
    if axis(argument(b, "dim"), rank) != dim.index:
        return False
    spans = [span_of(cut, dim, value_of(source).shape[dim.index]) for cut in (a, b)]
    return spans[0] is not None and spans[1] is not None and spans[0].is_apart_from(spans[1])
