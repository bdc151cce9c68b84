"""Copy rows that leave the graph to a storage of their own, so that the value they are part of can die.

Terms
-----
base, cut, part, cover   See `parts`: outputs that show some rows of a storage whose other rows are not returned.

    for each part that is worth a copy:
        own = copy_rows(cover), as early as that costs no memory:
            after the loop that reads the base last, if it reads all of it (the base exists until then anyway)
            else directly after the base: a loop that reads its rows may then overwrite them
        the outputs become views of `own`

Before:  x1, k1 = stage_1(...); x2, k2 = stage_2(..., x1, k1); ...; return (..., k1[:, :, -w:])
After:   x1, k1 = stage_1(...); x2, k2 = stage_2(..., x1, k1); own = copy_rows(k1[:, :, -w:]); ...; return (..., own)
         with room for a row: own = copy_rows(k1[:, :, -w:], room=2); ...; return (..., own[:, :, 1:])
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from mom_passes.errors import PassError
from mom_passes.graph.aliasing import aliased_operand, viewed_operand, views_of
from mom_passes.graph.edit import copy_view, emit, fake_value, node_after
from mom_passes.graph.meta import meta_value
from mom_passes.graph.strides import storage_order
from mom_passes.graph.values import bytes_of, input_node, is_size, return_values, returned_values
from mom_passes.loops.loop import MiniSequence
from mom_passes.ops.rows import COPY_ROWS
from mom_passes.program.parts import Part, find_parts
from mom_passes.rules.view import TO_THE_END

aten = torch.ops.aten


@dataclass(frozen=True)
class OwnRows:
    """A copy that was made: the names of cover and base, and the bytes of copy and base at the captured sizes."""

    name: str
    base: str
    bytes: int
    base_bytes: int


def own_rows(gm: fx.GraphModule) -> tuple[OwnRows, ...]:
    """Insert the copies, in place, and return them."""
    found = find_parts(gm)
    made = tuple(_Rewriter(gm, part).run() for part in found)
    if made:
        gm.recompile()
    return made


class _Rewriter:
    """Makes one part's copy, and its outputs views of it."""

    def __init__(self, gm: fx.GraphModule, part: Part) -> None:
        self.gm = gm
        self.graph = gm.graph
        self.part = part
        self.output = gm.graph.output_node()
        self.moved: dict[fx.Node, fx.Node] = {}

    def run(self) -> OwnRows:
        cover = self._cover()
        with self.graph.inserting_before(cover.next):
            own = emit(self.graph, COPY_ROWS, (cover, list(storage_order(meta_value(cover))), self.part.room))
        seen: dict[fx.Node, fx.Node] = {}
        with self.graph.inserting_before(self.output):
            for cut, rows in self.part.cuts.items():
                seen[cut] = self._after_room(own) if rows is None else self._within(own, cut, rows)
            replaced = {output: self._through(output, seen) for output in self.part.outputs}
        return_values(self.graph, [replaced.get(value, value) for value in returned_values(self.graph)])
        _erase_unread(self.graph, self.part.outputs)
        return OwnRows(cover.name, self.part.base.name, bytes_of(own), bytes_of(self.part.base))

    def _cover(self) -> fx.Node:
        """The cover's node, moved to the place of its copy unless its sizes are not known there."""
        part = self.part
        place = _place(self.gm, part.base)
        try:
            cover = self._at(part.cover, place)
        except PassError:
            cover = part.cover
        if part.rows is None:
            return cover
        with self.graph.inserting_before(max(place, cover.next)):
            return emit(self.graph, aten.slice.Tensor, (cover, part.dim, *part.rows))

    def _at(self, node: fx.Node, place: fx.Node) -> fx.Node:
        """A view or a size, or a copy of it before `place` together with its operands."""
        if node < place:
            return node
        if node not in self.moved:
            if not is_size(node) and aliased_operand(node) is None:
                raise PassError(f"{node.name} is not there yet", node)
            made_of = {source: self._at(source, place) for source in node.all_input_nodes}
            with self.graph.inserting_before(place):
                self.moved[node] = self.graph.node_copy(node, made_of.__getitem__)
        return self.moved[node]

    def _after_room(self, own: fx.Node) -> fx.Node:
        if self.part.room is None:
            return own
        return emit(self.graph, aten.slice.Tensor, (own, self.part.room, 1, TO_THE_END))

    def _within(self, own: fx.Node, cut: fx.Node, rows: tuple[int, int]) -> fx.Node:
        """The rows of a cut, taken from the copy."""
        if cut.target is aten.select.int:
            return emit(self.graph, aten.select.int, (own, self.part.dim, rows[0]))
        return emit(self.graph, aten.slice.Tensor, (own, self.part.dim, *rows))

    def _through(self, node: fx.Node, seen: dict[fx.Node, fx.Node]) -> fx.Node:
        """A view of a cut, as the same view of the copy, which is dense."""
        if node not in seen:
            seen[node] = copy_view(self.graph, node, self._through(input_node(node), seen))
            try:
                seen[node].meta["val"] = fake_value(seen[node])
            except (RuntimeError, ValueError):
                seen[node].target = aten.reshape.default
                seen[node].meta["val"] = fake_value(seen[node])
        return seen[node]


def _place(gm: fx.GraphModule, base: fx.Node) -> fx.Node:
    """The node before which a base's part is copied."""
    views = views_of(base)
    readers = {user for view in views for user in view.users if user not in views and user.op != "output"}
    last = max(readers, default=None)
    if last is None or last.op != "call_module":
        return node_after(base)
    loop = gm.get_submodule(str(last.target))
    if not isinstance(loop, MiniSequence) or not views.isdisjoint(loop.loop.rows_of(last).values()):
        return node_after(base)
    return node_after(last)


def _erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase unread nodes and, recursively, the views and sizes that only these read."""
    pending = dict.fromkeys(nodes)
    while pending:
        node, _ = pending.popitem()
        unneeded = viewed_operand(node) is not None or is_size(node)
        if node.op == "call_function" and not node.users and unneeded:
            pending.update(dict.fromkeys(node.all_input_nodes))
            graph.erase_node(node)
