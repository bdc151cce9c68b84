"""What operators that are compiled together hold at a time, by how compilers fuse them.

Terms
-----
held    Has storage of its own. Views have none. Neither has what a compiler computes where it is read, pointwise
        work, gathers and constants, unless a product, a sort or a reader outside reads it.
alive   From where a value is made to its last reader. Who reads what is computed where it is read, reads what that
        is made of.

    bytes = most, over the operators, of the bytes of all held values that are alive there

What a kernel needs for itself is not counted. A compiler may reorder operators and so need less.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mom_passes.program.storages import shares_with
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


@dataclass(frozen=True)
class Costs:
    """Of a value: its bytes in the graph's sizes, and what they are at the captured sizes, to compare by."""

    bytes: Callable[[fx.Node], sympy.Expr]
    number: Callable[[sympy.Expr], int]
    #: Whether a compiler fuses; else every operator's result but a view is held, and nothing is written over.
    fused: bool = True


def most_held(
    nodes: Collection[fx.Node], given: Iterable[fx.Node], kept: Callable[[fx.Node], bool], costs: Costs
) -> sympy.Expr:
    """The most that `nodes` hold at a time, with those of the values they are `given` that die among them.

    `kept` says of a value whether it is read behind them, and so lives to the end.
    """
    held = _Held(nodes, given, kept, costs)
    totals = held.numbers()
    return held.bytes_at(max(totals, key=totals.__getitem__)) if totals else sympy.S.Zero


class _Held:
    """The held values, and the positions between which each is alive."""

    def __init__(
        self, nodes: Collection[fx.Node], given: Iterable[fx.Node], kept: Callable[[fx.Node], bool], costs: Costs
    ) -> None:
        self.costs = costs
        self.position = {node: i for i, node in enumerate(nodes)}
        self.storage = self._storages(nodes, given)
        self.kept = {self.storage[node] for node in nodes if kept(node) and node in self.storage}
        self.computed = self._computed_where_read() if costs.fused else set()
        self.reads: dict[fx.Node, set[fx.Node]] = {}
        self.first: dict[fx.Node, int] = {}
        self.last: dict[fx.Node, int] = {}
        for node, at in self.position.items():
            self._visit(node, at)
        self.last |= dict.fromkeys(self.kept & self.first.keys(), len(self.position))

    def _visit(self, node: fx.Node, at: int) -> None:
        self.reads[node] = self._reads(node)
        storage = self.storage.get(node)
        if storage is not None and storage in self.computed:
            return
        if storage is not None:
            self.first.setdefault(storage, at if storage in self.position else 0)
            self.last[storage] = at
        for read in self.reads[node]:
            self.first.setdefault(read, 0)
            self.last[read] = at

    def numbers(self) -> dict[fx.Node, int]:
        """Bytes that are held at each operator, at the captured sizes."""
        size = {storage: self.costs.number(self.costs.bytes(storage)) for storage in self.first}
        change = [0] * (len(self.position) + 2)
        for storage, first in self.first.items():
            change[first] += size[storage]
            change[self.last[storage] + 1] -= size[storage]
        totals = dict(zip(self.position, itertools.accumulate(change), strict=False))
        return {node: total - (size[node] if self._written_over(node) else 0) for node, total in totals.items()}

    def bytes_at(self, node: fx.Node) -> sympy.Expr:
        at = self.position[node]
        alive = [storage for storage, first in self.first.items() if first <= at <= self.last[storage]]
        if self._written_over(node):
            alive.remove(node)
        return sympy.expand(sum((self.costs.bytes(storage) for storage in alive), sympy.S.Zero))

    def _written_over(self, node: fx.Node) -> bool:
        """Whether a result goes where an operand, made among the same and as large, dies."""
        if node not in self.first or not _is_fused(node) or not self.costs.fused:
            return False
        dying = [s for s in self.reads[node] if self.last[s] == self.position[node] and s in self.position]
        return any(sympy.expand(self.costs.bytes(s) - self.costs.bytes(node)) == 0 for s in dying)

    def _computed_where_read(self) -> set[fx.Node]:
        found = {s for s in self.storage.values() if s in self.position and _is_fused(s) and s not in self.kept}
        for value, storage in self.storage.items():
            for user in value.users:
                takes_it_in = _is_view(user) or _is_fused(user) or packet_of(user.target) in _COMPUTING
                if user in self.position and not takes_it_in:
                    found.discard(storage)
        return found

    def _reads(self, node: fx.Node) -> set[fx.Node]:
        """The held values among a node's operands, and those that its other operands are computed from."""
        found: set[fx.Node] = set()
        for storage in filter(None, map(self.storage.get, node.all_input_nodes)):
            found |= self.reads[storage] if storage in self.computed else {storage}
        return found

    @staticmethod
    def _storages(nodes: Iterable[fx.Node], given: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
        """Value -> the one whose storage it shares, itself mostly. What is the caller's has none here."""
        found: dict[fx.Node, fx.Node] = {node: node for node in given}
        for node in nodes:
            source = shares_with(node)
            if source is None:
                found[node] = node
            elif source in found:
                found[node] = found[source]
        return found


def _is_view(node: fx.Node) -> bool:
    return getattr(node.target, "is_view", False) or node.target is operator.getitem


def _is_fused(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or packet_of(node.target) in _GATHERS
