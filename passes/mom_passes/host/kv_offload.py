"""Copy keys and values to the host as soon as they are complete, and back to the device for their attention.

Terms
-----
leave     What the cache keeps is copied to the host: all rows of a value without a past, else only the new ones.
arrive    A past is copied to a device buffer with room for the new rows. Here the copy begins after the inputs;
          `mom_passes.program.overlap` moves its beginning.

    for each key and value that leaves the graph:
        made from a past on the host:  cat([fetch(past), new])  ->  buffer = fetch_start(past, rows of new)
                                                                    full   = fetch_wait(buffer, new)
                                                                    kept   = append(past, new)
        else                                                    ->  kept   = offload(full)
    any other value that is fetched from the host arrives in the same way

Before:  k1 = cat([fetch(h1), new1], 2); ...; attention(q1, k1, v1); ...; return (..., k1)
After:   buffer1 = fetch_start(h1, 1, 2); ...; k1 = fetch_wait(buffer1, new1, 2); h1' = append(h1, new1, 2, 0)
         attention(q1, k1, v1); ...; return (..., h1')
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from mom_passes.attention.reads import source_chain
from mom_passes.graph.edit import emit, first_operator, node_after, size_node
from mom_passes.graph.sizes import Size
from mom_passes.graph.values import is_size, return_values, returned_values, value_of
from mom_passes.host.kv_values import KeyOrValue, KVValues, find_kv, located
from mom_passes.host.relaid import replace_relaid
from mom_passes.ops.transfers import APPEND, FETCH, FETCH_START, FETCH_WAIT, OFFLOAD
from mom_passes.rules.views import is_view, relabels

aten = torch.ops.aten


@dataclass(frozen=True)
class KVOffload:
    """Values that leave, names of values that stay with the reason, and the number of pasts that arrive."""

    leaving: tuple[KeyOrValue, ...]
    left_out: dict[str, str]
    arriving: int

    def __bool__(self) -> bool:
        return bool(self.leaving) or self.arriving > 0


def kv_offload(gm: fx.GraphModule, device: torch.device, *, start: bool, kv: KVValues | None = None) -> KVOffload:
    """Insert the copies, in place.

    Parameters
    ----------
    device
        The device of the attentions.
    start
        Whether values without a past on the host leave too.
    kv
        The keys and values of the graph before loops were inserted; found in the graph by default.
    """
    kv = find_kv(gm) if kv is None else located(gm, kv)
    leaving = tuple(value for value in kv.found if start or value.past is not None)
    left_out = {value.node.name: value.reason for value in kv.left_out} if start else {}
    rewriter = _Rewriter(gm, device)
    for value in leaving:
        if value.past is None:
            _bring_up(value.full)
    complete = _complete(leaving)
    for value in leaving:
        rewriter.keep_on_host(value, complete[value.layer])
    if leaving:
        _erase_unused(gm)
    arriving = rewriter.let_arrive()
    if leaving or arriving:
        gm.recompile()
    return KVOffload(leaving, left_out, arriving)


def _bring_up(full: fx.Node) -> None:
    """Move the views and copies between a value and its source up to the source: outputs are made last in the graph."""
    *between, root = source_chain(full)
    place = node_after(root)
    sizes = {size for node in between for size in node.all_input_nodes if size not in between and size is not root}
    if all(size < place for size in sizes):
        last = place.prev
        for node in reversed(between):
            last.append(node)
            last = node


def _complete(leaving: Iterable[KeyOrValue]) -> dict[int, fx.Node]:
    """For each layer, the value that is complete last: the layer's copies are placed there together."""
    last: dict[int, fx.Node] = {}
    for value in leaving:
        last[value.layer] = max(last.get(value.layer, value.full), value.full)
    return last


class _Rewriter:
    def __init__(self, gm: fx.GraphModule, device: torch.device) -> None:
        self.graph = gm.graph
        self.device = device
        #: Views of inputs, moved to follow the inputs and precede every fetch of them.
        self.ahead: set[fx.Node] = set()

    def keep_on_host(self, value: KeyOrValue, complete: fx.Node) -> None:
        """Copy a value to the host. `complete`: the last value of its layer, used if it has no past."""
        first = self._size(value.first)
        if value.past is None:
            with self.graph.inserting_before(node_after(complete)):
                host = emit(self.graph, OFFLOAD, (value.full, value.dim, first, value.layer))
        else:
            assert value.new is not None
            ahead = self._bring_ahead(value.past)
            assert ahead, f"{value.past.name} is no view of an input"
            full = self._arrive(value.past, value.new, value.dim, before=value.full)
            replace_relaid(value.full, full)
            with self.graph.inserting_before(node_after(full)):
                host = emit(self.graph, APPEND, (value.past, value.new, value.dim, first))
        kept = list(returned_values(self.graph))
        for position in value.outputs:
            kept[position] = host
        return_values(self.graph, kept)

    def let_arrive(self) -> int:
        """Let fetches arrive early that no `cat` extends. Return the number of pasts that arrive in all."""
        for node in list(self.graph.nodes):
            if node.target is FETCH and node.users and self._bring_ahead(node.args[0]):
                dim = max(0, value_of(node).dim() - 2)
                replace_relaid(node, self._arrive(node.args[0], None, dim, before=node))
        return sum(node.target is FETCH_START for node in self.graph.nodes)

    def _arrive(self, past: fx.Node, new: fx.Node | None, dim: int, before: fx.Node) -> fx.Node:
        rows = 0 if new is None else self._size(value_of(new).shape[dim])
        with self.graph.inserting_before(first_operator(self.graph, self.ahead)):
            buffer = emit(self.graph, FETCH_START, (past, rows, dim, self.device))
        with self.graph.inserting_before(before):
            return emit(self.graph, FETCH_WAIT, (buffer, new, dim))

    def _bring_ahead(self, past: fx.Node) -> bool:
        """Move the views between a past and its input ahead of the fetches. False if these are not all views."""
        views: list[fx.Node] = []
        pending = [past]
        while pending:
            node = pending.pop()
            if node.op in ("placeholder", "get_attr") or node in self.ahead:
                continue
            if not relabels(node) and not is_size(node):
                return False
            views.append(node)
            pending += node.all_input_nodes
        for node in sorted(set(views)):
            first_operator(self.graph, self.ahead).prepend(node)
            self.ahead.add(node)
        return True

    def _size(self, size: Size) -> int | fx.Node:
        """A size, computed right after the inputs so that it is available everywhere."""
        first = first_operator(self.graph, self.ahead)
        with self.graph.inserting_before(first):
            found: int | fx.Node = size_node(self.graph, size, before=first)
        return found


def _erase_unused(gm: fx.GraphModule) -> None:
    """Erase unread fetches, concatenations, slices and views. Operators with effects and loops stay."""
    for node in reversed(list(gm.graph.nodes)):
        cheap = node.target in (FETCH, aten.cat.default, aten.slice.Tensor) or is_view(node)
        if node.op == "call_function" and cheap and not node.users:
            gm.graph.erase_node(node)
