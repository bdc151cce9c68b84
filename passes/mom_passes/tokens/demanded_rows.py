"""Compute only the rows that are needed: move slices along the tokens up to where rows are cheapest to slice.

Terms
-----
token slice   `x[:, -1:]`, `x[:, :-1]`, `x[:, -k:]`, `x[:, i]` along the token dimension of `x`.
span          A range of rows `[start, start + count)`; sizes may be symbolic.
needed        Of each value, the smallest span with the rows of all readers; None if a reader needs every row.
narrowed      A value that is needed in a span only: its operator runs on that span, by its chunk rule.
cut           A narrowed operator may read a value that another reader needs whole. The value is then sliced or, if it
              is cheap, computed again from narrower values. Chosen by min-cut over the bytes per token of the slices.

    needed, from the outputs to the inputs:    slice -> its span;  rows -> what the reader needs;  all -> every row
    for node in graph:
        needed in a span   ->  its operator on the rows of that span
        a token slice      ->  a slice of the narrowed value, or nothing
        else               ->  unchanged

Before:  q = mm(n, wq); a = attention(q, k, v); y = mlp(x + a); logits = mm(norm(y), w)[:, -1:]
After:   r = x[:, -1:]; q = mm(norm(r), wq); a = attention(q, k, v, start=S - 1); y = mlp(r + a); logits = ...

Keys and values stay complete: an attention needs all of them for a single row of queries.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, expr, same
from mom_passes.graph.values import is_tensor, operands, value_of
from mom_passes.rules import Dim, Need, Rows, Window, claim_for
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.view import TO_THE_END
from mom_passes.rules.views import is_cut
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.in_part import InPart, dead

aten = torch.ops.aten


@dataclass(frozen=True)
class Span:
    """Rows `[start, start + count)` as sympy expressions, which compare equal if they are."""

    start: sympy.Expr
    count: sympy.Expr

    @property
    def end(self) -> sympy.Expr:
        return sympy.expand(self.start + self.count)

    def reaches(self, before: int) -> bool:
        """Whether the sequence is known to have `before` rows before the span."""
        first = sympy.expand(self.start - before)
        return before == 0 or bool(first.is_Integer and first >= 0)

    def read(self, need: Rows) -> Span:
        """Return the rows of an operand that a call on this span needs."""
        return self if not need.before else Span(sympy.expand(self.start - need.before), self.count + need.before)

    def is_apart_from(self, other: Span) -> bool:
        """Whether two spans are known to have no common row."""
        gaps = (sympy.expand(other.start - self.end), sympy.expand(self.start - other.end))
        return any(gap.is_Integer and gap >= 0 for gap in gaps)


class Piece(NamedTuple):
    """Rows of a value along one of its dimensions."""

    node: fx.Node
    dim: Dim
    span: Span


def read_by(piece: Piece) -> list[Piece | None]:
    """Return the piece of each operand that the operator of a piece reads, None for all of the operand.

    Raises `CannotChunk` if it cannot run on the rows of the piece, or may need rows before the sequence.
    """
    node, dim, span = piece
    needs = claim_for(node, dim).needs
    if not all(span.reaches(need.before) for need in needs if isinstance(need, Rows)):
        raise CannotChunk(node, dim, "may need rows before the first row of the sequence")
    pairs = zip(operands(node), needs, strict=True)
    return [Piece(n, need.dim, span.read(need)) if isinstance(need, Rows) else None for n, need in pairs]


#: The span of a value with a reader that needs every row.
EVERY_ROW: None = None


def span_of(node: fx.Node, dim: Dim, length: Size) -> Span | None:
    """Return the rows that a slice or select takes from an operand with tokens in `dim`, None for other operators."""
    if not is_cut(node) or not dim.plain:
        return None
    rank = value_of(operands(node)[0]).dim()
    if axis(argument(node, "dim"), rank) != dim.index:
        return None
    if node.target is aten.select.int:
        return _selected(argument(node, "index"), length)
    return _sliced(node, dim, length)


def _selected(index: Any, length: Size) -> Span | None:
    if not isinstance(index, int):
        return None
    start = expr(length) + index if index < 0 else expr(index)
    return Span(sympy.expand(start), sympy.Integer(1))


def _sliced(node: fx.Node, dim: Dim, length: Size) -> Span | None:
    count = expr(value_of(node).shape[dim.index])
    start, end, step = (argument(node, name) for name in ("start", "end", "step"))
    if step != 1 or same(count, 0) or same(count, length):
        return None
    if isinstance(end, fx.Node):
        end = meta_value(end)
    if end is None or (isinstance(end, int) and end >= TO_THE_END) or same(end, length):
        return Span(sympy.expand(expr(length) - count), count)
    if start is None or (isinstance(start, int) and start >= 0):
        return Span(expr(start or 0), count)
    if isinstance(start, int) and isinstance(length, int):
        return Span(expr(max(0, length + start)), count)
    return None  # relative to the end of an unknown length: it may start before the first row


def hull(a: Span, b: Span) -> Span | None:
    """Return the smallest span that contains both, None if symbolic sizes do not determine it."""
    start, end = b.start - a.start, b.end - a.end
    if not (start.is_Integer and end.is_Integer):
        return None
    low = b.start if start < 0 else a.start
    high = b.end if end > 0 else a.end
    return Span(low, sympy.expand(high - low))


@dataclass
class Needs:
    """The rows of each token-carrying value that its readers need. Values without readers are absent."""

    dims: TokenDims
    spans: dict[fx.Node, Span | None]

    def narrowed(self, node: fx.Node) -> Span | None:
        """Return the span in which a node is computed, None for every row.

        A call with carries, or with rows before the span that may not exist, is computed whole, with its tuple items.
        """
        span = self.spans.get(node) if node in self.dims.rowwise else None
        if span is None:
            return None
        call = node.all_input_nodes[0] if node.target is operator.getitem else node
        claim = claim_for(call, self.dims.carriers[call].dim, in_order=True)
        rows = [need for need in claim.needs if isinstance(need, Rows)]
        return span if not claim.carries and all(span.reaches(need.before) for need in rows) else None

    def add(self, node: fx.Node, span: Span | None) -> None:
        known = self.spans.get(node, span)
        both = None if known is None or span is None else hull(known, span)
        if both is not None and same(both.count, self.dims.carriers[node].length):
            both = EVERY_ROW
        self.spans[node] = both


def needed_rows(gm: fx.GraphModule, dims: TokenDims) -> Needs:
    """Return the spans of all values."""
    needs = Needs(dims, {})
    for reader in reversed(gm.graph.nodes):
        for operand, span in _demands_of(reader, needs):
            if operand in dims.carriers:
                needs.add(operand, span)
    for node in dims.rowwise:
        # One call computes all items of a tuple.
        if node.target is operator.getitem and node in needs.spans:
            needs.spans[node] = needs.spans[node.all_input_nodes[0]]
    return needs


def _demands_of(reader: fx.Node, needs: Needs) -> list[tuple[fx.Node, Span | None]]:
    """Return the span that a reader needs of each operand."""
    if dead(reader):
        return []
    inputs = [n for n in reader.all_input_nodes if is_tensor(n)]
    if reader.op != "call_function":
        return [(n, EVERY_ROW) for n in inputs]
    carrier = needs.dims.carriers.get(inputs[0]) if inputs else None
    if carrier is not None:
        span = span_of(reader, carrier.dim, carrier.length)
        if span is not None:
            return [(inputs[0], span)]
    span = needs.narrowed(reader)
    if span is None:
        return [(n, EVERY_ROW) for n in inputs]
    carriers = needs.dims.carriers
    reads = zip(operands(reader), read_by(Piece(reader, carriers[reader].dim, span)), strict=True)
    return [(n, EVERY_ROW if p is None or (n in carriers and carriers[n].dim != p.dim) else p.span) for n, p in reads]


def demanded_rows(gm: fx.GraphModule, dims: TokenDims) -> fx.GraphModule:
    """Return a new graph in which slices along the tokens have moved up, or the same graph if there are none."""
    needs = needed_rows(gm, dims)
    if not any(needs.narrowed(node) is not None for node in needs.spans):
        return gm
    return _Narrower(gm, needs).run()


class _Narrower(InPart[Piece]):
    def __init__(self, gm: fx.GraphModule, needs: Needs) -> None:
        super().__init__(gm)
        self.needs = needs

    def is_in_part(self, node: fx.Node) -> bool:
        return self.needs.narrowed(node) is not None

    def taken(self, node: fx.Node) -> fx.Node | None:
        """Return what a token slice selects from its narrowed source, None if the source is not narrowed."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or self.needs.narrowed(source) is None:
            return None
        carrier = self.needs.dims.carriers[source]
        span = span_of(node, carrier.dim, carrier.length)
        assert span is not None
        rows = self.rows(Piece(source, carrier.dim, span))
        if node.target is aten.select.int:
            rows = emit(self.graph, aten.select.int, (rows, carrier.dim.index, 0))
        return rows

    def reads(self, piece: Piece) -> list[Piece | None]:
        return read_by(piece)

    def reads_of_node(self, node: fx.Node) -> list[Piece | None]:
        span = self.needs.narrowed(node)
        assert span is not None
        return read_by(Piece(node, self.needs.dims.carriers[node].dim, span))

    def make(self, piece: Piece) -> fx.Node:
        node, dim, span = piece
        own = self.needs.narrowed(node)
        if own is not None and own != span:
            inner = Span(sympy.expand(span.start - own.start), span.count)
            return self._slice(self.rows(Piece(node, dim, own)), dim, inner, own.count)
        if own is None and piece in self.cut:
            return self._slice(self.whole_value(node), dim, span, None)
        reads = zip(operands(node), read_by(piece), strict=True)
        values = [self.whole_value(operand) if read is None else self.rows(read) for operand, read in reads]
        claim = claim_for(node, dim)
        start, count = size_node(self.graph, span.start), size_node(self.graph, span.count)
        window = Window(start, count, tuple(self._first_row(span, need, start) for need in claim.needs))
        return self.emit_rows(node, *call_on_rows(node, claim, window, values, self.whole_value))

    def _first_row(self, span: Span, need: Need, start: Any) -> Any:
        if not isinstance(need, Rows):
            return 0
        return size_node(self.graph, span.read(need).start) if need.before else start

    def _slice(self, value: fx.Node, dim: Dim, span: Span, length: Size | None) -> fx.Node:
        """Emit a slice of rows. A composite dim is unfolded first."""
        shape = list(value_of(value).shape)
        at = dim.index
        if not dim.plain:
            length = length if length is not None else _folded_length(shape[at], dim)
            unfolded = [*shape[:at], dim.outer, length, dim.inner, *shape[at + 1 :]]
            value, at = self.reshape(value, unfolded), at + 1
        start, end = size_node(self.graph, span.start), size_node(self.graph, span.end)
        rows = emit(self.graph, aten.slice.Tensor, (value, at, start, end))
        if not dim.plain:
            folded = expr(dim.outer) * span.count * expr(dim.inner)
            rows = self.reshape(rows, [*shape[: dim.index], folded, *shape[dim.index + 1 :]])
        return rows


def _folded_length(size: Size, dim: Dim) -> Size:
    return sympy.cancel(expr(size) / (expr(dim.outer) * expr(dim.inner)))
