"""Which views have to share the storage of what they are views of. An analysis.

A cut across the tokens, some channels or a head, is computed row by row like anything else and may be stored by itself.
The rest of its source then need not exist. Not so where the difference can be seen:

    outputs that show the same elements     -> a write to one is seen in the other
    operands of an operator from elsewhere  -> it is given the strides that eager mode gives it

Terms
-----
chain    An output, what it is a view of, and so on down to the value that owns the storage.
apart    Two outputs of one storage that have no element in common: pieces of a split, ranges of a dimension.

    for each storage: outputs that are not apart    -> the views of their chains that they do not have in common
    for each operand of an operator from elsewhere  -> the views of its chain
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
    """The views of a graph that are not to be stored by themselves."""
    found = _of_outputs(next(iter(reversed(gm.graph.nodes))))
    for node in gm.graph.nodes:
        if is_from_elsewhere(node.target) and not has_own_rule(node.target):
            for operand in operands(node):
                found.update(_chain(operand)[1:])
    return frozenset(found)


def _of_outputs(output: fx.Node) -> set[fx.Node]:
    by_storage: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in output.all_input_nodes:
        if isinstance(meta_value(node), torch.Tensor):
            chain = _chain(node)
            by_storage.setdefault(chain[0], []).append(chain)
    found: set[fx.Node] = set()
    for chains in by_storage.values():
        for one, other in itertools.combinations(chains, 2):
            if not _apart(one, other):
                found.update(set(one) ^ set(other))
    return found


def _chain(node: fx.Node) -> list[fx.Node]:
    """The value that owns the storage, and the views through which a node is seen, itself last."""
    return operand_chain(node, is_a_view)[::-1]


def _apart(one: Sequence[fx.Node], other: Sequence[fx.Node]) -> bool:
    """Whether two chains are known to end in views that have no element in common."""
    for a, b in zip(one, other, strict=False):
        if not (a is b or _views_alike(a, b)):
            return _cuts_apart(a, b)
    return False


def _views_alike(a: fx.Node, b: fx.Node) -> bool:
    """Of two views of values that are alike: whether they are alike, too."""
    return a.target == b.target and a.args[1:] == b.args[1:] and a.kwargs == b.kwargs


def _cuts_apart(a: fx.Node, b: fx.Node) -> bool:
    if a.target is b.target is operator.getitem:
        return True  # other pieces of a split
    if not (is_cut(a) and is_cut(b)):
        return False
    (source,), rank = operands(a), value_of(operands(a)[0]).dim()
    dim = Dim(axis(argument(a, "dim"), rank))
    if axis(argument(b, "dim"), rank) != dim.index:
        return False
    spans = [span_of(cut, dim, value_of(source).shape[dim.index]) for cut in (a, b)]
    return spans[0] is not None and spans[1] is not None and spans[0].is_apart_from(spans[1])
