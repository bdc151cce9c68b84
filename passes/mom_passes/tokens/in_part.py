"""Copy a graph in which some values are computed in part: only the rows that readers need. For slices and picks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import fx

from mom_passes.errors import CannotChunk, PassError
from mom_passes.graph.aliasing import is_mutation
from mom_passes.graph.edit import copy_call, emit, fake_value, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.min_cut import cheapest_cut
from mom_passes.graph.sizes import Size, count_hint, hint, same
from mom_passes.graph.values import returns_nothing, value_of
from mom_passes.rules import Dim, facts
from mom_passes.torch_compat import graph_module


class RowsOfValue(Hashable, Protocol):
    """Some rows of a value of the old graph along `dim`."""

    @property
    def node(self) -> fx.Node: ...

    @property
    def dim(self) -> Dim: ...


#: A piece: the rows of a value that are computed.
P = TypeVar("P", bound=RowsOfValue)


def dead(node: fx.Node) -> bool:
    """Whether an operator has no readers and no side effects."""
    return node.op == "call_function" and not (node.users or is_mutation(node) or returns_nothing(node))


class InPart(ABC, Generic[P]):
    """Copies a graph. A value that `is_in_part` is left out, and its rows are emitted at their first reader.

    An operator in part may read a value that another reader needs whole. The piece is then cut from the whole value or,
    if the value is cheap, computed again from other pieces. A min-cut over bytes per token chooses.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        self.whole: dict[fx.Node, fx.Node] = {}
        self.pieces: dict[P, fx.Node] = {}
        #: The pieces that are cut from whole values.
        self.cut: set[P] = set()

    def run(self) -> fx.GraphModule:
        self.cut = self._choose_cut()
        for node in self.gm.graph.nodes:
            if node.op == "output":
                output = self.graph.output(fx.map_arg(node.args[0], self.whole_value))
                output.meta = dict(node.meta)
            elif not dead(node) and not self.is_in_part(node):
                taken = self.taken(node)
                self.whole[node] = copy_call(self.graph, node, self.whole_value) if taken is None else taken
        self.graph.eliminate_dead_code()
        made = graph_module(self.gm, self.graph)
        made.meta = dict(self.gm.meta)
        return made

    def rows(self, piece: P) -> fx.Node:
        """Return the new graph's node for a piece."""
        if piece not in self.pieces:
            self.pieces[piece] = self.make(piece)
        return self.pieces[piece]

    def whole_value(self, node: fx.Node) -> fx.Node:
        if node not in self.whole:
            raise PassError(f"{node.name} is computed in part, and a reader needs all of it", node)
        return self.whole[node]

    def _choose_cut(self) -> set[P]:
        border: dict[P, None] = {}
        for node in filter(self.is_in_part, self.gm.graph.nodes):
            reads = (piece for piece in self.reads_of_node(node) if piece is not None)
            border.update((piece, None) for piece in reads if not self.is_in_part(piece.node))
        return cheapest_cut(border, lambda piece, order: bytes_per_row(piece.node, piece.dim, order), self._sources)

    def _sources(self, piece: P) -> list[P] | None:
        """Return the pieces from which a cheap operator computes a piece again, None if it is not cheap."""
        if self.is_in_part(piece.node) or not facts(piece.node).recompute:
            return None
        try:
            return [read for read in self.reads(piece) if read is not None]
        except CannotChunk:
            return None

    def emit_rows(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Emit the call that computes rows of a node."""
        new = self.graph.create_node("call_function", target, args, kwargs, name=f"{node.name}_rows")
        new.meta = {**node.meta, "val": fake_value(new)}
        return new

    def reshape(self, value: fx.Node, shape: Sequence[Size]) -> fx.Node:
        """Emit a reshape, unless a value has the shape."""
        known = list(value_of(value).shape)
        if len(known) == len(shape) and all(map(same, known, shape)):
            return value
        sizes = [size_node(self.graph, size) for size in shape]
        return emit(self.graph, torch.ops.aten.reshape.default, (value, sizes))

    @abstractmethod
    def is_in_part(self, node: fx.Node) -> bool:
        """Whether every reader of a value needs some rows of it only."""

    @abstractmethod
    def taken(self, node: fx.Node) -> fx.Node | None:
        """Return the result of a slice or pick of a value in part, None for any other operator."""

    @abstractmethod
    def reads(self, piece: P) -> list[P | None]:
        """Return the piece of each operand that computing a piece reads, None for all of the operand.

        Raises `CannotChunk` if the operator cannot compute the piece.
        """

    @abstractmethod
    def reads_of_node(self, node: fx.Node) -> list[P | None]:
        """Return the same for the piece that a value in part is computed in."""

    @abstractmethod
    def make(self, piece: P) -> fx.Node:
        """Emit a piece: sliced or gathered from the whole value, or computed from pieces of other values."""


def bytes_per_row(node: fx.Node, dim: Dim, order: int) -> int | None:
    """Return the cost of cutting rows from a value in a min-cut: bytes per token in thousandths, plus a tie-breaker.

    Ties prefer values near the readers. Inputs of the graph cost nothing else, since they exist. None for a tuple,
    whose items can be cut.
    """
    value = meta_value(node)
    tie = max(0, 999 - order)
    if not isinstance(value, torch.Tensor):
        return None
    if node.op in ("placeholder", "get_attr"):
        return tie
    per_token = count_hint(value.shape) * value.element_size() // max(1, hint(value.shape[dim.index]))
    return (1 if dim.plain else 2) * 1000 * max(1, per_token) + tie
