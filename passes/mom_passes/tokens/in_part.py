"""A new graph in which some values exist in part: rows that are made where they are read, for slices and for picks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Generic, TypeVar

from torch import fx

from mom_passes.errors import PassError
from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.edit import copy_call
from mom_passes.graph.values import returns_nothing

#: Rows of a value of the old graph.
P = TypeVar("P", bound=Hashable)


def dead(node: fx.Node) -> bool:
    """Whether nobody reads what an operator returns, and that is all it is called for."""
    return node.op == "call_function" and not (node.users or is_mutation(node) or returns_nothing(node))


class InPart(ABC, Generic[P]):
    """Copies a graph; what `is_in_part` is left out, and its rows are emitted where they are read."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, fx.Node] = {}
        self.pieces: dict[P, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for node in self.gm.graph.nodes:
            if node.op == "output":
                output = self.graph.output(fx.map_arg(node.args[0], self._whole))
                output.meta = dict(node.meta)
            elif not dead(node) and not self.is_in_part(node):
                taken = self.taken(node)
                self.whole[node] = copy_call(self.graph, node, self._whole) if taken is None else taken
        self.graph.eliminate_dead_code()
        made = fx.GraphModule(self.gm, self.graph)
        made.meta = dict(self.gm.meta)
        return made

    def rows(self, piece: P) -> fx.Node:
        """The new graph's node for some rows of an old value."""
        if piece not in self.pieces:
            self.pieces[piece] = self.make(piece)
        return self.pieces[piece]

    def _whole(self, node: fx.Node) -> fx.Node:
        if node not in self.whole:
            raise PassError(f"{node.name} is needed whole after all", node)
        return self.whole[node]

    @abstractmethod
    def is_in_part(self, node: fx.Node) -> bool:
        """Whether everybody reads rows of a value alone."""

    @abstractmethod
    def taken(self, node: fx.Node) -> fx.Node | None:
        """What an operator takes out of a value that exists in part; None for any other operator."""

    @abstractmethod
    def make(self, piece: P) -> fx.Node:
        """Emit some rows: cut from the whole value, or computed from rows of others."""
