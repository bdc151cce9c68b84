"""Let a cache on the device grow in place: a decode step writes its new rows and copies no old row.

Before:  k1 = cat([past, new], 2);    attention(q, k1, v1); return (..., k1)
After:   k1 = extend(past, new, 2);   attention(q, k1, v1); return (..., k1)

`extend` runs between compiled pieces. Rows are outermost in its result, so its strides do not depend on the room after
them and one graph serves every step. A prompt's keys and values get the same layout, so that the first step after it
moves no row and uses the same graph.

Before:  k = permute(view(product));                           return k      [B, G, S, D], batch outermost
After:   k = copy_rows(permute(view(product)), [2, 0, 1, 3]);  return k      for B = 1 no copy is needed
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit, fake_mode, node_after, strides_differ
from mom_passes.graph.meta import meta_value
from mom_passes.graph.values import input_node, value_of
from mom_passes.host.kv_values import KVValues, find_kv, located
from mom_passes.host.relaid import replace_relaid
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.ops.transfers import EXTEND, OFFLOAD, growing_order

aten = torch.ops.aten


def extend_in_place(gm: fx.GraphModule, kv: KVValues, static: Collection[str] = ()) -> int:
    """Replace concatenations of a cached input with new rows, in place. Return their number.

    `static` names parameters and buffers, which are not caches. A cache keeps all rows or, for a window, the last ones.
    A value that is offloaded only under memory pressure grows on the device first.
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
    """Give keys and values of a prompt the layout of `extend`, in place. Return how many had another."""
    made = 0
    for value in find_kv(gm).found:
        full, shape = value.full, value_of(value.full).shape
        order = growing_order(shape, value.dim)
        with fake_mode(gm.graph):
            wanted = torch.empty_permuted(shape, order, dtype=value_of(full).dtype, device=value_of(full).device)
        if _grows(full, value.dim, static) or not strides_differ(wanted, meta_value(full)):
            continue
        with gm.graph.inserting_before(node_after(full)):
            replace_relaid(full, emit(gm.graph, COPY_ROWS, (full, order)))
        made += 1
    if made:
        gm.recompile()
    return made


def _on_device(value: fx.Node) -> fx.Node:
    """The device value if all rows of it are copied to the host, else the value itself."""
    leaves = value.target is OFFLOAD and value.args[2] == 0
    return input_node(value) if leaves else value


def _may_move(past: fx.Node, grown: Collection[fx.Node]) -> bool:
    """Whether an input may get other strides within the call: pieces that read it are compiled for its old ones."""
    return all(user in grown or user.target is aten.sym_size.int for user in past.users)


def _grows(node: fx.Node, dim: int, static: Collection[str]) -> bool:
    """Whether a value is an input concatenated with new rows along `dim`."""
    if node.target is not aten.cat.default or len(argument(node, "tensors")) != 2:
        return False
    past, new = argument(node, "tensors")
    if axis(argument(node, "dim"), value_of(node).dim()) != dim or past.op != "placeholder" or past.name in static:
        return False
    return all(value_of(part).dtype == value_of(node).dtype for part in (past, new))
