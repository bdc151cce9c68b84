"""A cache on the device grows in place: a step writes its new rows and copies none of the old ones.

Before:  k1 = cat([past, new], 2);    attention(q, k1, v1); return (..., k1)
After:   k1 = extend(past, new, 2);   attention(q, k1, v1); return (..., k1)

`extend` is a step between compiled pieces. Rows are outermost in its result, so that its strides do not depend on the
room behind them, and one graph serves every step. A prompt's keys and values are laid out like that, too: the first
step behind it moves none, and has the graph of all others.

Before:  k = permute(view(product));                           return k      [B, G, S, D], a sequence outermost
After:   k = copy_rows(permute(view(product)), [2, 0, 1, 3]);  return k      of one sequence it stays as it is
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import behind, emit, fake_mode, strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import input_node, value_of
from mom_passes.host.kv_values import KVValues, find_kv, located
from mom_passes.host.relaid import replace_relaid
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import EXTEND, OFFLOAD, growing_order

aten = torch.ops.aten


def extend_in_place(gm: fx.GraphModule, kv: KVValues, static: Collection[str] = ()) -> int:
    """Replace each concatenation of a cached input with new rows. Return their number.

    `static` names parameters and buffers, which are the model's and no cache. The cache keeps all rows or, of a window,
    the last ones. A value that leaves for the host only where it has to grows on the device first.
    """
    found = {_on_device(value.full): value.dim for value in located(gm, kv).found}
    grown = {node: dim for node, dim in found.items() if _grows(node, dim, static)}
    grown = {node: dim for node, dim in grown.items() if _may_move(argument(node, "tensors")[0], grown)}
    for node, dim in grown.items():
        past, new = argument(node, "tensors")
        with gm.graph.inserting_before(node):
            extended = emit(gm.graph, EXTEND, (past, new, dim))
        extended.meta = {**node.meta, "val": meta_value(extended)}
        replace_relaid(node, extended)
        gm.graph.erase_node(node)
    if grown:
        gm.recompile()
    return len(grown)


def lay_out_for_growth(gm: fx.GraphModule, static: Collection[str] = ()) -> int:
    """Lay out the keys and values that a cache keeps, and that an input has no part in, as `extend` does. Return how
    many were not."""
    made = 0
    for value in find_kv(gm).found:
        full, shape = value.full, value_of(value.full).shape
        order = growing_order(shape, value.dim)
        with fake_mode(gm.graph):
            wanted = torch.empty_permuted(shape, order, dtype=value_of(full).dtype, device=value_of(full).device)
        if _grows(full, value.dim, static) or not strides_differ(wanted, meta_value(full)):
            continue
        with gm.graph.inserting_before(behind(full)):
            replace_relaid(full, emit(gm.graph, COPY_ROWS, (full, order)))
        made += 1
    if made:
        gm.recompile()
    return made


def _on_device(value: fx.Node) -> fx.Node:
    """What all rows of a value are copied from to the host, if they are, or else the value."""
    leaves = value.target is OFFLOAD and value.args[2] == 0
    return input_node(value) if leaves else value


def _may_move(past: fx.Node, grown: Collection[fx.Node]) -> bool:
    """Whether an input may get other strides within the call: pieces that read it would be made for those it had."""
    return all(user in grown or user.target is aten.sym_size.int for user in past.users)


def _grows(node: fx.Node, dim: int, static: Collection[str]) -> bool:
    """Whether a value is an input of a call with rows behind it, along `dim`."""
    if node.target is not aten.cat.default or len(argument(node, "tensors")) != 2:
        return False
    past, new = argument(node, "tensors")
    if axis(argument(node, "dim"), value_of(node).dim()) != dim or past.op != "placeholder" or past.name in static:
        return False
    return all(value_of(part).dtype == value_of(node).dtype for part in (past, new))
