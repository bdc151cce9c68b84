"""Drop empty operands of concatenations, such as the empty past of a new cache.

Before:  keys = cat([past, k], 2)        past [B, H, 0, D]
After:   keys = clone(k)                 a cache's value keeps a storage of its own, as `cat` gives it

If several operands have entries, they are concatenated without the empty ones.
"""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.arguments import argument, aten
from mom_passes.graph.edit import fake_value
from mom_passes.graph.sizes import same
from mom_passes.graph.values import value_of


def drop_empty_parts(gm: fx.GraphModule) -> int:
    """Drop empty operands in place and return their number."""
    dropped = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
        parts = list(argument(node, "tensors"))
        kept = [part for part in parts if not _is_empty(part)]
        if not kept or len(kept) == len(parts) or any(value_of(part).dtype != value_of(node).dtype for part in kept):
            continue
        dropped += len(parts) - len(kept)
        if len(kept) > 1:
            node.args = (kept, *node.args[1:])
            continue
        node.target, node.args, node.kwargs = aten.clone.default, (kept[0],), {"memory_format": torch.contiguous_format}
        node.meta["val"] = fake_value(node)
    if dropped:
        gm.recompile()
    return dropped


def _is_empty(part: fx.Node) -> bool:
    return any(same(size, 0) for size in value_of(part).shape)
