"""Compute only the rows that are picked by an index tensor: picks move up to where rows are cheapest to pick.

Terms
-----
pick      `x[arange(B), last]` and the like (`tokens.picks`): rows of which only the run knows the numbers.
picked    A value of which everybody needs the same picks, and whose operator can be run on any rows alone.
piece     Picks of a value: along its tokens, for each entry along its batch dim. A value that has none (positions,
          rotary tables) is picked *flat*: the rows of all entries, one behind the other, along its tokens.
cut       Where a picked operator reads a value of which others need every row: rows are gathered from it, or, where
          it is cheap, it is made once more from gathered rows. By min-cut, as in `demanded_rows`.

Before:  q = mm(n, wq); a = attention(q, k, v); y = mlp(x + a); logits = mm(norm(y), w)[arange(B), last]
After:   r = gather(x, 1, last); q = mm(norm(r), wq); a = attention(q, k, v, mask=key <= last); y = mlp(r + a); ...

An operator may be run on any rows, in any order, if rows are independent along the tokens and along the batch, and if
none of its arguments says where in the sequence its rows stand. An attention's does: few queries get a mask instead
(`tokens.picked_queries`). A gather checks its index; so a number that is out of range raises, wherever the pick stands.
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
from mom_passes.graph.edit import emit, fake_value, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.min_cut import cheapest_cut
from mom_passes.graph.sizes import Size, expr, is_one, same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.rules import All, Claim, Dim, Rows, Window, claim_for, facts
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.factories import pointwise_claim
from mom_passes.rules.view import locate
from mom_passes.tokens.demanded_rows import bytes_per_row
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.in_part import InPart, dead
from mom_passes.tokens.picked_queries import masked_call, may_be_masked
from mom_passes.tokens.picks import Pick, Picks, pick_of

aten = torch.ops.aten

#: Operators whose arguments change with the number of rows, and not with where these stand.
COUNTING = frozenset([
    *overloads(aten, "empty.memory_format expand full new_empty new_full new_ones new_zeros ones repeat reshape"),
    *overloads(aten, "slice.Tensor squeeze squeeze.dim squeeze.dims view _unsafe_view zeros"),
    *overloads(prims, "reshape"),
])  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Picks of a value along `dim`, for each entry along `batch`, or flat where that is None."""

    node: fx.Node
    dim: Dim
    batch: Dim | None
    picks: Picks

    @property
    def count(self) -> sympy.Expr:
        """How many rows it has along `dim`."""
        return self.picks.flat_count if self.batch is None else self.picks.count


def read_by(piece: Piece) -> list[Piece | None]:
    """What the operator of a piece reads of each operand: a piece, or None for all of it.

    Raises `CannotChunk` where it cannot be run on picked rows alone.
    """
    node, picks = piece.node, piece.picks
    tokens = claim_for(node, piece.dim)
    _check_runs_anywhere(piece, tokens)
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
            raise CannotChunk(node, piece.dim, f"{operand.name} has no rows of each entry's own")
        batch = entries.dim if isinstance(entries, Rows) else None
        wanted = Piece(operand, rows.dim, batch, picks)
        if node.target is not operator.getitem and _unfolded(wanted) is None:
            raise CannotChunk(node, piece.dim, f"rows of {operand.name} are folded in a way that none can be picked")
        found.append(wanted)
    return found


def _check_runs_anywhere(piece: Piece, claim: Claim) -> None:
    node = piece.node
    if any(isinstance(need, Rows) and need.before for need in claim.needs):
        raise CannotChunk(node, piece.dim, "needs rows before its own")
    if node.target is MOM_ATTENTION:
        may_be_masked(node, piece.dim, piece.batch, piece.picks)
    elif claim.edit is not None and node.target not in COUNTING:
        raise CannotChunk(node, piece.dim, "its arguments say where its rows stand")


def _may_spread(node: fx.Node, piece: Piece) -> bool:
    """Whether an operand without entries can be given those of the others: a broadcasting operator repeats it."""
    plain = piece.dim.plain and piece.batch is not None and piece.batch.plain and piece.batch.index < piece.dim.index
    return plain and (facts(node).rule is pointwise_claim or node.target is MOM_ATTENTION)


@dataclass
class PickedValues:
    """Which rows of each value its readers pick; None for every row. Values nobody reads are absent."""

    dims: TokenDims
    found: dict[fx.Node, Piece | None]
    picks: dict[fx.Node, Pick]

    def picked(self, node: fx.Node) -> Piece | None:
        """The piece that a value is computed in, alone."""
        return self.found.get(node)

    def reads(self, node: fx.Node) -> list[Piece | None]:
        """What a node reads of each operand, if it is picked itself or a pick."""
        if node in self.picks:
            pick = self.picks[node]
            own = Piece(pick.source, pick.dim, pick.batch, pick.picks)
            return [own if operand is pick.source else None for operand in operands(node)]
        piece = self.picked(node)
        return [None] * len(operands(node)) if piece is None else read_by(piece)


def picked_values(gm: fx.GraphModule, dims: TokenDims) -> PickedValues:
    """From the outputs of the graph back."""
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
        # What one operator returns at once is made at once.
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
    """A new graph in which picks have moved up; the same graph where there are none, or nothing to gain."""
    values = picked_values(gm, dims)
    if not any(values.picked(node) is not None for node in values.found):
        return gm
    return _Mover(gm, values).run()


class _Mover(InPart[Piece]):
    def __init__(self, gm: fx.GraphModule, values: PickedValues) -> None:
        super().__init__(gm)
        self.values = values
        self.gathered = _where_to_gather(gm, values)
        self.numbers: dict[Picks, fx.Node] = {}

    def is_in_part(self, node: fx.Node) -> bool:
        return self.values.picked(node) is not None

    def taken(self, node: fx.Node) -> fx.Node | None:
        """A pick of a picked value: that value, in the shape that the pick gave its rows."""
        pick = self.values.picks.get(node)
        if pick is None or not self.is_in_part(pick.source):
            return None
        rows = self.rows(Piece(pick.source, pick.dim, pick.batch, pick.picks))
        return self._reshape(rows, list(value_of(node).shape))

    def make(self, piece: Piece) -> fx.Node:
        again = self.is_in_part(piece.node) or piece not in self.gathered
        return self._run_on_pieces(piece) if again else self._gather(piece)

    def _run_on_pieces(self, piece: Piece) -> fx.Node:
        """The piece's operator, run on pieces."""
        node = piece.node
        claim = claim_for(node, piece.dim)
        values = [
            self._whole(operand) if read is None else self._spread(self.rows(read), read, piece)
            for operand, read in zip(operands(node), read_by(piece), strict=True)
        ]
        if node.target is MOM_ATTENTION:
            args: tuple[Any, ...]
            kwargs: dict[str, Any]
            target, args, kwargs = masked_call(node, self.graph, values, self._whole, self.row_numbers(piece.picks))
        else:
            count = size_node(self.graph, piece.count)
            at = Window(0, count, (0,) * len(claim.needs))
            target, args, kwargs = call_on_rows(node, claim, at, values, self._whole)
        new = self.graph.create_node("call_function", target, args, kwargs, name=f"{node.name}_rows")
        new.meta = {**node.meta, "val": fake_value(new)}
        return new

    def _spread(self, value: fx.Node, read: Piece, piece: Piece) -> fx.Node:
        """Flat rows `[1, entries * count, D]` as each entry's, `[entries, count, D]`, where the reader has entries."""
        if read.batch is not None or piece.batch is None or piece.picks.entries is None:
            return value
        rank, shape = value_of(piece.node).dim(), list(value_of(value).shape)
        shape = [*[1] * (rank - len(shape)), *shape]
        at, batch = piece.dim.index, piece.batch.index
        apart = [*shape[:at], piece.picks.entries, piece.picks.count, *shape[at + 1 :]]
        order = [*range(len(apart))]
        order[batch], order[at] = at, batch
        turned = emit(self.graph, aten.permute.default, (self._reshape(value, apart), order))
        shape[batch], shape[at] = piece.picks.entries, piece.picks.count
        return self._reshape(turned, shape)

    def _gather(self, piece: Piece) -> fx.Node:
        """The rows, from the whole value. Tokens and entries folded with others are unfolded first."""
        value = self._whole(piece.node)
        unfolded = _unfolded(piece)
        assert unfolded is not None
        shape, at, batch = unfolded
        value = self._reshape(value, shape)
        numbers = self.row_numbers(piece.picks)
        spread: list[Any] = [1] * len(shape)
        spread[at] = piece.count
        if batch is not None:
            spread[batch] = piece.picks.entries
        numbers = self._reshape(numbers, spread)
        size = [*shape[:at], piece.count, *shape[at + 1 :]]
        index = emit(self.graph, aten.expand.default, (numbers, [size_node(self.graph, n) for n in size]))
        rows = emit(self.graph, aten.gather.default, (value, at, index))
        length = piece.picks.length
        folded = [
            expr(n) / length * piece.count if d == piece.dim.index else n
            for d, n in enumerate(value_of(piece.node).shape)
        ]
        return self._reshape(rows, [sympy.cancel(n) if isinstance(n, sympy.Expr) else n for n in folded])

    def row_numbers(self, picks: Picks) -> fx.Node:
        """`[entries, count]`, or `[count]` where they are the same for all; negative are only those out of range."""
        if picks not in self.numbers:
            numbers = self._whole(picks.index)
            if value_of(numbers).dtype != torch.int64:
                numbers = emit(self.graph, torch.ops.prims.convert_element_type.default, (numbers, torch.int64))
            if picks.wraps:
                beyond = emit(self.graph, aten.add.Tensor, (numbers, size_node(self.graph, picks.length)))
                negative = emit(self.graph, aten.lt.Scalar, (numbers, 0))
                numbers = emit(self.graph, aten.where.self, (negative, beyond, numbers))
            shape = [picks.count] if picks.entries is None else [picks.entries, picks.count]
            self.numbers[picks] = self._reshape(numbers, shape)
        return self.numbers[picks]

    def _reshape(self, value: fx.Node, shape: list[Size]) -> fx.Node:
        known = list(value_of(value).shape)
        if len(known) == len(shape) and all(map(same, known, shape)):
            return value
        return emit(self.graph, aten.reshape.default, (value, [size_node(self.graph, size) for size in shape]))


def _unfolded(piece: Piece) -> tuple[list[Size], int, int | None] | None:
    """A shape of the whole value in which tokens and entries are dimensions of their own, and which; None if there is
    none."""
    value = meta_value(piece.node)
    if not isinstance(value, torch.Tensor):
        return None
    shape, at, length = list(value.shape), piece.dim.index, piece.picks.length
    apart: list[Size] = [*shape[:at], *([] if is_one(piece.dim.outer) else [piece.dim.outer]), length]
    place = len(apart) - 1
    apart += [*([] if is_one(piece.dim.inner) else [piece.dim.inner]), *shape[at + 1 :]]
    if piece.batch is None or piece.picks.entries is None:
        return apart, place, None
    batch = locate(piece.batch, shape, apart)
    if batch is None or batch.index == place:
        return None
    if not batch.plain:
        index = batch.index
        own = [n for n in (batch.outer, piece.picks.entries, batch.inner) if not is_one(n)]
        apart = [*apart[:index], *own, *apart[index + 1 :]]
        place += (len(own) - 1) * (index < place)
        index += not is_one(batch.outer)
        return apart, place, index
    return (apart, place, batch.index) if same(apart[batch.index], piece.picks.entries) else None


def _where_to_gather(gm: fx.GraphModule, values: PickedValues) -> set[Piece]:
    """Of the pieces that picked operators read of values needed whole: which are gathered. The others are made once
    more, from what is gathered further up."""
    borders: dict[Piece, None] = {}
    for node in gm.graph.nodes:
        if values.picked(node) is None:
            continue
        for read in values.reads(node):
            if read is not None and values.picked(read.node) is None:
                borders[read] = None
    return cheapest_cut(borders, _cost, lambda piece: _made_again_from(piece, values))


def _made_again_from(piece: Piece, values: PickedValues) -> list[Piece] | None:
    """The pieces from which a cheap operator makes this one once more; None if it is not cheap."""
    if values.picked(piece.node) is not None or not facts(piece.node).recompute:
        return None
    try:
        return [read for read in read_by(piece) if read is not None]
    except CannotChunk:
        return None


def _cost(piece: Piece, order: int) -> int | None:
    return bytes_per_row(piece.node, piece.dim, order)
