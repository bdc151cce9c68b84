"""Collectives of a captured graph as single operators, and the masks of a sharded embedding as `where`.

    wait_tensor(all_reduce(x, "sum", group))     ->  mom.all_reduce(x, "sum", group)
    index_put(x, [mask], number)                 ->  where(mask, number, x)

A collective whose result has another reader than its waits stays as it is. So does an `index_put` by anything else than
one mask and one number.
"""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.arguments import argument, aten
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import value_of
from mom_passes.ops.collectives import BEGINS
from mom_passes.torch_compat import collective


def outline_collectives(gm: fx.GraphModule) -> int:
    """Replace collectives and their waits, in place. Return the number of collectives."""
    wait, found = collective("wait_tensor"), 0
    for target, name in BEGINS.items():
        begin = collective(name)
        for node in gm.graph.find_nodes(op="call_function", target=begin) if begin is not None else ():
            waits = list(node.users)
            if node.kwargs or not isinstance(node.args[-1], str) or any(user.target is not wait for user in waits):
                continue
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(target, node.args)
            new.meta = {**node.meta, "val": meta_value(waits[0] if waits else node)}
            for user in waits:
                user.replace_all_uses_with(new)
                gm.graph.erase_node(user)
            gm.graph.erase_node(node)
            found += 1
    return found


def masked_puts_as_where(gm: fx.GraphModule) -> int:
    """Replace writes of one number where a mask is true, in place. Return how many."""
    found = 0
    for node in gm.graph.find_nodes(op="call_function", target=aten.index_put.default):
        source, indices, number = node.args[:3]
        tensors = [one for one in indices if one is not None]
        if argument(node, "accumulate") or len(tensors) != 1 or len(indices) != 1:
            continue
        mask = tensors[0]
        if value_of(mask).dtype is not torch.bool or value_of(number).dim() != 0:
            continue
        with gm.graph.inserting_before(node):
            shown = value_of(mask)
            for _ in range(value_of(source).dim() - shown.dim()):
                mask = gm.graph.call_function(aten.unsqueeze.default, (mask, -1))
                shown = mask.meta["val"] = shown.unsqueeze(-1)
            new = gm.graph.call_function(aten.where.self, (mask, number, source))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        found += 1
    return found
