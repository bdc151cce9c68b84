"""Compute only the rows that an index tensor picks: move picks up to where rows are cheapest to gather.

Terms
-----
pick      `x[arange(B), last]` and similar (`tokens.picks`): rows with numbers that are known at run time only.
picked    A value whose readers all need the same picks, and whose operator can run on any rows.
piece     Picks of a value: along its tokens, for each entry along its batch dim. A value without a batch dim (rotary
          tables) is picked *flat*: the rows of all entries are concatenated along its tokens.
cut       A picked operator may read a value that another reader needs whole. Rows are then gathered from it or, if it
          is cheap, it is computed again from gathered rows. Chosen by min-cut, as in `demanded_rows`.

Before:  q = mm(n, wq); a = attention(q, k, v); y = mlp(x + a); logits = mm(norm(y), w)[arange(B), last]
After:   r = gather(x, 1, last); q = mm(norm(r), wq); a = attention(q, k, v, mask=key <= last); y = mlp(r + a); ...

An operator can run on any rows, in any order, if rows are independent along tokens and batch, and if no argument
depends on the position of the rows. The arguments of an attention do, so a few queries get a mask instead
(`tokens.picked_queries`). A gather checks its index, so a row number out of range raises an error after the move, too.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import overloads, prims
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, expr, is_one, same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules import All, Claim, Dim, Rows, Window, claim_for, facts
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.factories import pointwise_claim
from mom_passes.rules.view import locate
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.in_part import InPart, dead
from mom_passes.tokens.picked_queries import check_maskable, masked_call
from mom_passes.tokens.picks import Pick, Picks, pick_of

aten = torch.ops.aten

#: Operators whose arguments depend on the number of rows but not on their position.
COUNTING = frozenset([
    *overloads(aten, "empty.memory_format expand full new_empty new_full new_ones new_zeros ones repeat reshape"),
    *overloads(aten, "slice.Tensor squeeze squeeze.dim squeeze.dims view _unsafe_view zeros"),
    *overloads(prims, "reshape"),
])  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Picks of a value along `dim`, for each entry along `batch`, or flat if `batch` is None."""

    node: fx.Node
    dim: Dim
    batch: Dim | None
    picks: Picks

    @property
    def count(self) -> sympy.Expr:
        """The number of rows along `dim`."""
        return self.picks.flat_count if self.batch is None else self.picks.count


def read_by(piece: Piece) -> list[Piece | None]:
    """Return the piece of each operand that the operator of a piece reads, None for all of the operand.

    Raises `CannotChunk` if the operator cannot run on picked rows.
    """
    node, picks = piece.node, piece.picks
    tokens = claim_for(node, piece.dim)
    _check_is_position_free(piece, tokens)
    if piece.batch is None:
        along: list[Any] = [None] * len(tokens.needs)
    else:
        along = list(claim_for(node, piece.batch).needs)
    found: list[Piece | None] = []
    for operand, rows, entries in zip(operands(node), tokens.needs, along, strict=True):
        if isinstance(rows, All):
            found.append(None)
            continue
        if entries is not None and not isinstance(entries, Rows) and not _may_spread(node, piece):
            raise CannotChunk(node, piece.dim, f"{operand.name} has no rows per batch entry")
        batch = entries.dim if isinstance(entries, Rows) else None
        wanted = Piece(operand, rows.dim, batch, picks)
        if node.target is not operator.getitem and _unfolded(wanted) is None:
            raise CannotChunk(node, piece.dim, f"rows of {operand.name} cannot be unfolded from its other dimensions")
        found.append(wanted)
    return found


def _check_is_position_free(piece: Piece, claim: Claim) -> None:
    """Raise `CannotChunk` if an operator depends on the position of its rows."""
    node = piece.node
    if any(isinstance(need, Rows) and need.before for need in claim.needs):
        raise CannotChunk(node, piece.dim, "needs rows before its own")
    if node.target is MOM_ATTENTION:
        check_maskable(node, piece.dim, piece.batch, piece.picks)
    elif claim.edit is not None and node.target not in COUNTING:
        raise CannotChunk(node, piece.dim, "its arguments depend on the position of its rows")


def _may_spread(node: fx.Node, piece: Piece) -> bool:
    """Whether an operand without a batch dim can be picked per entry: a broadcasting operator repeats it."""
    plain = piece.dim.plain and piece.batch is not None and piece.batch.plain and piece.batch.index < piece.dim.index
    return plain and (facts(node).rule is pointwise_claim or node.target is MOM_ATTENTION)


@dataclass
class PickedValues:
    """The piece of each value that its readers pick, None for every row. Values without readers are absent."""

    dims: TokenDims
    found: dict[fx.Node, Piece | None]
    picks: dict[fx.Node, Pick]

    def picked(self, node: fx.Node) -> Piece | None:
        """Return the only piece of a value that is computed, None if all of it is."""
        return self.found.get(node)

    def reads(self, node: fx.Node) -> list[Piece | None]:
        """Return the piece of each operand that a node reads, None for all of it."""
        if node in self.picks:
            pick = self.picks[node]
            own = Piece(pick.source, pick.dim, pick.batch, pick.picks)
            return [own if operand is pick.source else None for operand in operands(node)]
        piece = self.picked(node)
        return [None] * len(operands(node)) if piece is None else read_by(piece)


def picked_values(gm: fx.GraphModule, dims: TokenDims) -> PickedValues:
    """Return the picked pieces of all values, from the outputs of the graph to its inputs."""
    picks = {node: pick for node in gm.graph.nodes if (pick := pick_of(node, dims)) is not None}
    values = PickedValues(dims, {}, picks)
    if not picks:
        return values
    for node in reversed(gm.graph.nodes):
        if dead(node):
            continue
        if not _may_be_picked(values, node):
            values.found[node] = None
        for operand, piece in zip(operands(node), values.reads(node), strict=True):
            known = values.found.get(operand, piece)
            values.found[operand] = piece if known == piece else None
    for node in gm.graph.nodes:
        # One call computes all items of a tuple.
        if node.target is operator.getitem and values.picked(node.args[0]) is None:
            values.found[node] = None
    return values


def _may_be_picked(values: PickedValues, node: fx.Node) -> bool:
    piece = values.picked(node)
    carrier = values.dims.carriers.get(node)
    if piece is None or carrier is None or node not in values.dims.rowwise or piece.dim != carrier.dim:
        return False
    try:
        read_by(piece)
    except CannotChunk:
        return False
    return True


def picked_rows(gm: fx.GraphModule, dims: TokenDims) -> fx.GraphModule:
    """Return a new graph in which picks have moved up, or the same graph if none can move."""
    values = picked_values(gm, dims)
    if not any(values.picked(node) is not None for node in values.found):
        return gm
    return _Mover(gm, values).run()


class _Mover(InPart[Piece]):
    def __init__(self, gm: fx.GraphModule, values: PickedValues) -> None:
        super().__init__(gm)
        self.values = values
        self.numbers: dict[Picks, fx.Node] = {}

    def is_in_part(self, node: fx.Node) -> bool:
        return self.values.picked(node) is not None

    def taken(self, node: fx.Node) -> fx.Node | None:
        """Return the rows of a picked source in the shape of the pick, None if the source is not picked."""
        pick = self.values.picks.get(node)
        if pick is None or not self.is_in_part(pick.source):
            return None
        rows = self.rows(Piece(pick.source, pick.dim, pick.batch, pick.picks))
        return self.reshape(rows, list(value_of(node).shape))

    def reads(self, piece: Piece) -> list[Piece | None]:
        return read_by(piece)

    def reads_of_node(self, node: fx.Node) -> list[Piece | None]:
        return self.values.reads(node)

    def make(self, piece: Piece) -> fx.Node:
        computed = self.is_in_part(piece.node) or piece not in self.cut
        return self._run_on_pieces(piece) if computed else self._gather(piece)

    def _run_on_pieces(self, piece: Piece) -> fx.Node:
        """Emit the operator of a piece on pieces of its operands."""
        node = piece.node
        claim = claim_for(node, piece.dim)
        values = [
            self.whole_value(operand) if read is None else self._spread(self.rows(read), read, piece)
            for operand, read in zip(operands(node), read_by(piece), strict=True)
        ]
        if node.target is MOM_ATTENTION:
            numbers = self.row_numbers(piece.picks)
            return self.emit_rows(node, *masked_call(node, self.graph, values, self.whole_value, numbers))
        window = Window(0, size_node(self.graph, piece.count), (0,) * len(claim.needs))
        return self.emit_rows(node, *call_on_rows(node, claim, window, values, self.whole_value))

    def _spread(self, value: fx.Node, read: Piece, piece: Piece) -> fx.Node:
        """Reshape flat rows `[1, entries * count, D]` to `[entries, count, D]` if the reader has a batch dim."""
        if read.batch is not None or piece.batch is None or piece.picks.entries is None:
            return value
        rank, shape = value_of(piece.node).dim(), list(value_of(value).shape)
        shape = [*[1] * (rank - len(shape)), *shape]
        at, batch = piece.dim.index, piece.batch.index
        separate = [*shape[:at], piece.picks.entries, piece.picks.count, *shape[at + 1 :]]
        order = [*range(len(separate))]
        order[batch], order[at] = at, batch
        permuted = emit(self.graph, aten.permute.default, (self.reshape(value, separate), order))
        shape[batch], shape[at] = piece.picks.entries, piece.picks.count
        return self.reshape(permuted, shape)

    def _gather(self, piece: Piece) -> fx.Node:
        """Gather rows from the whole value. Tokens and entries folded with other dimensions are unfolded first."""
        value = self.whole_value(piece.node)
        unfolded = _unfolded(piece)
        assert unfolded is not None
        shape, at, batch = unfolded
        value = self.reshape(value, shape)
        numbers = self.row_numbers(piece.picks)
        spread: list[Any] = [1] * len(shape)
        spread[at] = piece.count
        if batch is not None:
            spread[batch] = piece.picks.entries
        numbers = self.reshape(numbers, spread)
        size = [*shape[:at], piece.count, *shape[at + 1 :]]
        index = emit(self.graph, aten.expand.default, (numbers, [size_node(self.graph, n) for n in size]))
        rows = emit(self.graph, aten.gather.default, (value, at, index))
        length = piece.picks.length
        folded = [
            expr(n) / length * piece.count if d == piece.dim.index else n
            for d, n in enumerate(value_of(piece.node).shape)
        ]
        return self.reshape(rows, [sympy.cancel(n) if isinstance(n, sympy.Expr) else n for n in folded])

    def row_numbers(self, picks: Picks) -> fx.Node:
        """Emit row numbers `[entries, count]`, or `[count]` if all entries share them. Valid ones are nonnegative."""
        if picks not in self.numbers:
            numbers = self.whole_value(picks.index)
            if value_of(numbers).dtype != torch.int64:
                numbers = emit(self.graph, torch.ops.prims.convert_element_type.default, (numbers, torch.int64))
            if picks.wraps:
                beyond = emit(self.graph, aten.add.Tensor, (numbers, size_node(self.graph, picks.length)))
                negative = emit(self.graph, aten.lt.Scalar, (numbers, 0))
                numbers = emit(self.graph, aten.where.self, (negative, beyond, numbers))
            shape = [picks.count] if picks.entries is None else [picks.entries, picks.count]
            self.numbers[picks] = self.reshape(numbers, shape)
        return self.numbers[picks]


def _unfolded(piece: Piece) -> tuple[list[Size], int, int | None] | None:
    """Return a shape of the whole value in which tokens and entries are separate dimensions, and the indices of these.

    None if there is no such shape. The second index is None for flat picks and for picks shared by all entries.
    """
    value = meta_value(piece.node)
    if not isinstance(value, torch.Tensor):
        return None
    shape, at, length = list(value.shape), piece.dim.index, piece.picks.length
    separate: list[Size] = [*shape[:at], *([] if is_one(piece.dim.outer) else [piece.dim.outer]), length]
    place = len(separate) - 1
    separate += [*([] if is_one(piece.dim.inner) else [piece.dim.inner]), *shape[at + 1 :]]
    if piece.batch is None or piece.picks.entries is None:
        return separate, place, None
    batch = locate(piece.batch, shape, separate)
    if batch is None or batch.index == place:
        return None
    if not batch.plain:
        index = batch.index
        own = [n for n in (batch.outer, piece.picks.entries, batch.inner) if not is_one(n)]
        separate = [*separate[:index], *own, *separate[index + 1 :]]
        place += (len(own) - 1) * (index < place)
        index += not is_one(batch.outer)
        return separate, place, index
    return (separate, place, batch.index) if same(separate[batch.index], piece.picks.entries) else None
