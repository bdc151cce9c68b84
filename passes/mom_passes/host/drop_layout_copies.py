"""Offload keys and values in the layout of their projections, in which the heads of a token are adjacent.

A cache on the host has one row per token. Eager mode concatenates a prompt's keys with an empty cache, which makes a
copy head by head. A copy to the host, which moves runs of bytes, would have to gather each row again.

Before:  k = clone(permute(view(product)));  return k        After:  return permute(view(product))
"""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.attention.reads import source_of
from mom_passes.graph.edit import strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import input_node
from mom_passes.host.kv_values import find_kv
from mom_passes.host.relaid import replace_relaid

aten = torch.ops.aten


def drop_layout_copies(gm: fx.GraphModule) -> int:
    """Remove such copies, in place, and return their number. Values that are inputs keep their layout."""
    copies = [value.full for value in find_kv(gm).found if _only_lays_out(value.full)]
    for copy in copies:
        replace_relaid(copy, input_node(copy))
        gm.graph.erase_node(copy)
    if copies:
        gm.recompile()
    return len(copies)


def _only_lays_out(node: fx.Node) -> bool:
    if node.target is not aten.clone.default:
        return False
    (operand,) = node.all_input_nodes
    return source_of(node).op == "call_function" and strides_differ(meta_value(node), meta_value(operand))
