"""Reuse device buffers of weights: a weight arrives in the buffer of an earlier one of the same kind without readers.

    for each copy to the device, in order:
        take over a buffer of the same shape, strides and dtype whose last reader is before the copy

So two layers of weights have fixed buffers, whatever else is allocated and freed between them.

Before:  b0 = fetch_start(w0); b1 = fetch_start(w1); ... last reader of b0 ...; b2 = fetch_start(w2)
After:   the same, with b2 = fetch_start(w2, over=b0)
"""

from __future__ import annotations

from collections.abc import Collection, Hashable

from torch import fx

from mom_passes.graph.aliasing import may_be_a_view
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, expr
from mom_passes.graph.values import tensors_of
from mom_passes.rules.work import matmul_work


def reuse_slots(gm: fx.GraphModule, waits: Collection[fx.Node]) -> int:
    """Set `over` of the copies that `waits` wait for, in place. Return the number of reused buffers."""
    if not waits:
        return 0
    starts = {start for wait in waits for start in wait.all_input_nodes}
    last = {start: _last_reader(start) for start in starts}
    free: dict[Hashable, list[fx.Node]] = {}
    dying: dict[fx.Node, list[fx.Node]] = {}
    for start, reader in last.items():
        dying.setdefault(reader, []).append(start)
    reused = 0
    for node in gm.graph.nodes:
        if node in starts:
            waiting = free.get(_kind(node))
            if waiting:
                node.args = (*node.args, waiting.pop(0))
                reused += 1
        for start in dying.get(node, ()):
            free.setdefault(_kind(start), []).append(start)
    gm.recompile()
    return reused


def _kind(start: fx.Node) -> Hashable:
    value = meta_value(start)
    shape, stride = (tuple(map(expr, sizes)) for sizes in (value.shape, value.stride()))
    return shape, stride, value.dtype, value.device


def _last_reader(start: fx.Node) -> fx.Node:
    """The last node that may read a buffer; the output if it is returned."""
    last, pending, seen = start, [start], {start}
    while pending:
        value = pending.pop()
        for user in value.users:
            last = max(last, user)
            if user not in seen and _may_share_storage(value, user):
                seen.add(user)
                pending.append(user)
    return last


def _may_share_storage(value: fx.Node, user: fx.Node) -> bool:
    """Whether a result may share its operand's storage: a compiler removes operators that compute nothing (`x + 0`)."""
    if user.op != "call_function" or matmul_work(user):
        return False
    return may_be_a_view(user) or not _sizes(user).isdisjoint(_sizes(value))


def _sizes(node: fx.Node) -> set[int]:
    """The bytes of each of a node's tensors."""
    return {count_hint(value.shape) * value.element_size() for value in tensors_of(node)}
