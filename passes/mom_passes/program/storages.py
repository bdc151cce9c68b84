"""The storage of each value of a rewritten graph.

    view, item, result of a write or of a wait    -> the operand's
    buffer that takes over another                -> that buffer's
    result that a loop writes over an operand     -> the operand's
    anything else                                 -> its own

Exact for the graph. `in_place` allows for the operators that a compiler removes.
"""

from __future__ import annotations

import operator

import sympy
import torch
from torch import fx

from mom_passes.graph.aliasing import aliased_operand
from mom_passes.graph.data_dependent import is_unknown
from mom_passes.graph.sizes import expr, product
from mom_passes.graph.values import tensors_of
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.ops.transfers import APPEND, EXTEND, FETCH_START, FETCH_WAIT, OFFLOAD, taken_over
from mom_passes.program.program import Place, Storage

#: Operators whose result is their first operand: a finished copy, a cache that grows in place, a write. Several results
#: of one operator count as one storage.
_WITHIN = frozenset({FETCH_WAIT, EXTEND, torch.ops.aten.copy_.default, operator.getitem})


def storages(gm: fx.GraphModule) -> dict[fx.Node, Storage]:
    """The storage of every tensor of a rewritten graph."""
    loops = {node: module.loop for node, module in loop_nodes(gm)}
    found: dict[fx.Node, Storage] = {}
    for node in gm.graph.nodes:
        if not tensors_of(node) or node in loops:
            continue
        base = _stored_in(node, loops)
        if base in found:
            found[node] = found[base]
        else:
            found[node] = Storage(node, bytes_of_value(node), _place(node))
    return found


def _stored_in(node: fx.Node, loops: dict[fx.Node, Loop]) -> fx.Node | None:
    """The value whose storage a result uses; None if it has its own."""
    source = shares_with(node)
    return loops[source].overwritten_by(node) if source in loops else source


def shares_with(node: fx.Node) -> fx.Node | None:
    """The operand whose storage a result uses, None if it has its own. The ports of a loop state it for its results."""
    source = node.args[0] if node.args else None
    if node.target is FETCH_START:
        return taken_over(node)
    if node.op == "call_function" and node.target in _WITHIN:
        return source if isinstance(source, fx.Node) else None
    return aliased_operand(node)


def bytes_of_value(node: fx.Node) -> sympy.Expr:
    """Bytes of a node's tensors, in the graph's sizes. Tensors whose sizes depend on data count as zero."""
    known = (value for value in tensors_of(node) if not is_unknown(value))
    return sum((expr(product(value.shape)) * value.element_size() for value in known), sympy.S.Zero)


def _place(node: fx.Node) -> Place:
    if node.op in ("placeholder", "get_attr"):
        return Place.CALLER
    return Place.HOST if node.target in (APPEND, OFFLOAD) else Place.DEVICE
