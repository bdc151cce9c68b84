"""Collectives of a captured graph as single operators.

    wait_tensor(all_reduce(x, "sum", group))     ->  mom.all_reduce(x, "sum", group)
    cat(split(all_gather(x, ranks, group)), -1)  ->  mom.gather_columns(x, ranks, group)

A collective whose result has another reader than its waits stays as it is.
"""

from __future__ import annotations

from torch import fx

from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.collectives import ALL_GATHER, BEGINS, GATHER_COLUMNS
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


def gathers_of_columns(gm: fx.GraphModule) -> int:
    """Replace gathers whose parts are put next to each other in the last dimension, in place. Return how many."""
    found = 0
    for node in gm.graph.find_nodes(op="call_function", target=ALL_GATHER):
        rows, ranks, group = node.args
        joined = _joined_columns(node, ranks)
        if joined is None:
            continue
        with gm.graph.inserting_before(joined):
            new = gm.graph.call_function(GATHER_COLUMNS, (rows, ranks, group))
        new.meta = dict(joined.meta)
        joined.replace_all_uses_with(new)
        parts = operands(joined)
        for old in (joined, *parts, parts[0].args[0], node):
            gm.graph.erase_node(old)
        found += 1
    return found


def _joined_columns(gathered: fx.Node, ranks: int) -> fx.Node | None:
    """Return the `cat` that puts the parts of all ranks next to each other; None if anything else reads them."""
    (split,) = gathered.users if len(gathered.users) == 1 else (None,)
    if split is None or split.target is not aten.split.Tensor or argument(split, "dim") != 0:
        return None
    by_number = {item.args[1]: item for item in split.users}
    items = [by_number[rank] for rank in range(ranks) if rank in by_number]
    readers = {reader for item in items for reader in item.users}
    if len(split.users) != ranks or len(readers) != 1:
        return None
    (joined,) = readers
    last = value_of(gathered).dim() - 1
    if joined.target is not aten.cat.default or axis(argument(joined, "dim"), last + 1) != last or last == 0:
        return None
    return joined if list(argument(joined, "tensors")) == items else None
