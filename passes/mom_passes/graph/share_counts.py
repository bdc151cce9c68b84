"""Compute equal counts once: positions, sequence numbers and masks that every layer of a model derives anew.

Inductor shares equal operators within one piece. A value that several loops read is stored between them, once for each
layer that derives it, if its nodes are not shared before the graph is cut.

    for node in graph, in order:
        if it returns integers or booleans, and only its operands decide which:
            an earlier node with the same operator and operands takes its place
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mom_passes.graph.aliasing import is_mutation, view_chain
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import expr
from mom_passes.graph.values import returned_values
from mom_passes.torch_compat import schema_of


def share_counts(gm: fx.GraphModule) -> int:
    """Replace equal nodes in place. Return how many were removed. A graph that writes to a value stays as it is."""
    if any(node.op == "call_function" and is_mutation(node) for node in gm.graph.nodes):
        return 0
    # Two results of a graph do not share their storage.
    results = [result for result in returned_values(gm.graph) if isinstance(result, fx.Node)]
    returned = {node for result in results for node in view_chain(result)}
    first: dict[Any, fx.Node] = {}
    removed = 0
    for node in list(gm.graph.nodes):
        if not _is_count(node) or node in returned:
            continue
        before = first.setdefault((node.target, _key(node.args), _key(node.kwargs)), node)
        if before is not node:
            node.replace_all_uses_with(before)
            gm.graph.erase_node(node)
            removed += 1
    return removed


def _is_count(node: fx.Node) -> bool:
    value = meta_value(node)
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or schema_of(node.target) is None:
        return False
    random = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
    return not random and not (value.is_floating_point() or value.is_complex()) and "empty" not in str(node.target)


def _key(value: Any) -> Any:
    """Return arguments as a key: numbers of different types are different, nodes of one symbolic size are equal."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(one)) for name, one in sorted(value.items()))
    if isinstance(value, fx.Node):
        size = meta_value(value)
        return (torch.SymInt, str(expr(size))) if isinstance(size, torch.SymInt) else value
    return type(value), repr(value)
