"""A cache on the device grows in place: a step writes its new rows and copies none of the old ones.

Before:  k1 = cat([past, new], 2);    attention(q, k1, v1); return (..., k1)
After:   k1 = extend(past, new, 2);   attention(q, k1, v1); return (..., k1)

`extend` is a step between compiled pieces. Its result is token-major: its strides depend neither on the number of
tokens nor on the room behind them, so one graph serves every step.
"""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit
from mom_passes.host.kv_values import KVValues, returned
from mom_passes.host.relaid import replace_relaid
from mom_passes.ops.transfers import EXTEND, OFFLOAD

aten = torch.ops.aten


def extend_in_place(gm: fx.GraphModule, kv: KVValues) -> int:
    """Replace each concatenation of a cached input with new rows that the cache keeps whole. Return their number.

    The cache may be the host's if it has to: a value that may stay on the device grows there first.
    """
    outputs = returned(gm)
    found = {_on_device(outputs[position]): value.dim for value in kv.found for position in value.outputs}
    grown = [(node, dim) for node, dim in found.items() if node is not None and _grows(node, dim)]
    for node, dim in grown:
        past, new = argument(node, "tensors")
        with gm.graph.inserting_before(node):
            extended = emit(gm.graph, EXTEND, (past, new, dim))
        extended.meta = {**node.meta, "val": extended.meta["val"]}
        replace_relaid(node, extended)
        gm.graph.erase_node(node)
    if grown:
        gm.recompile()
    return len(grown)


def _on_device(output: object) -> fx.Node | None:
    """What an output is, or what of the device all rows of it are copied from."""
    if not isinstance(output, fx.Node):
        return None
    leaves = output.target is OFFLOAD and output.args[2] == 0
    return output.args[0] if leaves else output  # type: ignore[return-value]


def _grows(node: fx.Node, dim: int) -> bool:
    """Whether a value is an input with rows behind it, along `dim`."""
    if node.target is not aten.cat.default or len(argument(node, "tensors")) != 2:
        return False
    past, new = argument(node, "tensors")
    if axis(argument(node, "dim"), node.meta["val"].dim()) != dim or past.op != "placeholder":
        return False
    return all(part.meta["val"].dtype == node.meta["val"].dtype for part in (past, new))
