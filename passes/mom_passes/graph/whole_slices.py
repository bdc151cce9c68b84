"""Remove slices that keep all rows.

The cache of a sliding window keeps `full[:, :, -window + 1:]`. With fewer rows than the window this slice keeps all of
them, and would be another value at full length besides the one that attention reads.

Before:  kept = slice(k, 2, -4095, end); attention(q, k, v); return (..., kept)          k has 1000 rows
After:   attention(q, k, v); return (..., k)
"""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.arguments import argument
from mom_passes.graph.sizes import all_same
from mom_passes.graph.values import value_of

aten = torch.ops.aten


def drop_whole_slices_of(gm: fx.GraphModule) -> int:
    """Remove them in place and return their number. A slice of an input stays: an output must not become the input."""
    removed = 0
    for node in list(gm.graph.nodes):
        if node.target is aten.slice.Tensor and _keeps_everything(node):
            node.replace_all_uses_with(argument(node, "self"))
            gm.graph.erase_node(node)
            removed += 1
    if removed:
        gm.recompile()
    return removed


def _keeps_everything(node: fx.Node) -> bool:
    source = argument(node, "self")
    return source.op != "placeholder" and all_same(value_of(source).shape, value_of(node).shape)
