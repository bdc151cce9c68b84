"""What the operators between loops hold: an upper estimate, from the rewritten graph, of what compiled code will need.

Terms
-----
run       Operators in a row, between two loops or copies. It is compiled as one piece.
held      Has storage of its own. Views have none. Neither has what a compiler computes where it is read, pointwise
          work, gathers and constants, unless a product, a sort or another run reads it, or the graph returns it.
alive     From where a value is made to its last reader. Who reads what is computed where it is read, reads what that
          is made of.

    bytes(run) = most, over the operators of the run, of the bytes of all held values that are alive there

Values made by loops and other runs count while they are alive. Inputs, parameters and what is on the host do not, nor
what a kernel needs for itself. A compiler may reorder operators and so need less.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mom_passes.graph.sizes import count_hint
from mom_passes.loops.loop import Loop, loop_nodes
from mom_passes.ops.transfers import APPEND, COPIES, FETCH_WAIT, OFFLOAD
from mom_passes.torch_compat import packet_of

aten, prims = torch.ops.aten, torch.ops.prims

#: Computed where they are read, like all that PyTorch calls pointwise: each element from anywhere in an operand.
_GATHERS = frozenset(
    {
        aten.arange, aten.constant_pad_nd, aten.embedding, aten.empty, aten.flip, aten.full, aten.gather, aten.index,
        aten.repeat, aten.scalar_tensor, aten.select_scatter, aten.slice_scatter, aten.tril, aten.triu, prims.iota,
    }
)  # fmt: skip

#: Held, but they compute what they read.
_COMPUTING = frozenset(
    {aten.amax, aten.amin, aten.any, aten.argmax, aten.argmin, aten.cat, aten.mean, aten.prod, aten.sum, aten.var}
)


def straight_bytes(gm: fx.GraphModule) -> int:
    """The most that is alive at a time while operators between loops run, in bytes at the captured sizes."""
    held = _Held(gm)
    return max((held.bytes_at(node) for node in held.run), default=0)


def straight_runs(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    """The runs in order. Views alone are none: nothing is compiled for them."""
    run: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("call_module", "output") or node.target in COPIES:
            if not all(_is_view(n) for n in run):
                yield run
            run = []
        elif _tensors(node) and node.op == "call_function" and not _is_loop_item(node):
            run.append(node)


class _Held:
    """The held values of a graph, and the positions between which each is alive."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.position = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.run = {node: i for i, run in enumerate(straight_runs(gm.graph)) for node in run}
        self.storage = _storages(gm)
        self.computed = self._computed_where_read()
        self.reads: dict[fx.Node, set[fx.Node]] = {}
        self.first: dict[fx.Node, int] = {}
        self.last: dict[fx.Node, int] = {}
        for node, at in self.position.items():
            self.reads[node] = self._reads(node)
            storage = self.storage.get(node)
            if storage is not None and storage in self.computed:
                continue
            if storage is not None:
                self.first.setdefault(storage, at)
                self.last[storage] = at
            self.last.update(dict.fromkeys(self.reads[node], at))

    def bytes_at(self, node: fx.Node) -> int:
        at = self.position[node]
        alive = (storage for storage, first in self.first.items() if first <= at <= self.last[storage])
        return sum(_bytes(storage) for storage in alive) - self._written_over(node)

    def _written_over(self, node: fx.Node) -> int:
        """Bytes of a result that goes where an operand, made in the same run and as large, dies."""
        if node not in self.first or not _is_fused(node):
            return 0
        for storage in self.reads[node]:
            dies = self.last[storage] == self.position[node] and self.run.get(storage) == self.run[node]
            if dies and _bytes(storage) == _bytes(node):
                return _bytes(node)
        return 0

    def _computed_where_read(self) -> set[fx.Node]:
        found = {storage for storage in self.storage.values() if storage in self.run and _is_fused(storage)}
        for value, storage in self.storage.items():
            for user in value.users:
                takes_it_in = _is_view(user) or _is_fused(user) or _packet(user) in _COMPUTING
                if not takes_it_in or self.run.get(user) != self.run.get(storage):
                    found.discard(storage)
        return found

    def _reads(self, node: fx.Node) -> set[fx.Node]:
        """The held values among a node's operands, and those that its other operands are computed from."""
        found: set[fx.Node] = set()
        for storage in filter(None, map(self.storage.get, node.all_input_nodes)):
            found |= self.reads[storage] if storage in self.computed else {storage}
        return found


def _storages(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Value -> the one whose storage it shares, itself mostly. What is the caller's or on the host has none here."""
    loops = {node: module.loop for node, module in loop_nodes(gm)}
    found: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or node.target in (APPEND, OFFLOAD) or not _tensors(node):
            continue
        base: Any = _shares(node, loops)
        if base is node:
            found[node] = node
        elif base in found:
            found[node] = found[base]
    return found


def _shares(node: fx.Node, loops: dict[fx.Node, Loop]) -> Any:
    """The value whose storage a node's result is in."""
    source: Any = node.args[0] if node.args else None
    if source in loops:
        return loops[source].overwritten_by(node) or node
    shared = _is_view(node) or node.target in (operator.getitem, FETCH_WAIT, aten.copy_.default)
    return source if shared else node


def _is_loop_item(node: fx.Node) -> bool:
    source: Any = node.args[0] if node.args else None
    return node.target is operator.getitem and source.op == "call_module"


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) or node.target is operator.getitem


def _is_fused(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or _packet(node) in _GATHERS


def _packet(node: fx.Node) -> Any:
    return packet_of(node.target)


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in values if isinstance(one, torch.Tensor)]


def _bytes(node: fx.Node) -> int:
    return sum(count_hint(value.shape) * value.element_size() for value in _tensors(node))
