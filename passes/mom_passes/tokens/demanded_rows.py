"""Compute only the rows that somebody needs: slices along the tokens move up to where rows are cheapest to cut.

Terms
-----
token slice   `x[:, -1:]`, `x[:, :-1]`, `x[:, -k:]`, `x[:, i]` along the token dimension of `x`.
span          A range of rows `[start, start + count)`; sizes may be symbolic.
needed        Of each value, the span all of its readers lie in; None if somebody needs every row.
narrowed      A value that is needed in a span only: its operator is run on that span, by its chunk rule.
cut           Where a narrowed operator reads a value of which others need every row: the value is sliced, or, where
              it is cheap, made once more from something narrower. By min-cut: bytes per token of what is sliced.

    needed, from the outputs back:    slice -> its span;  rows -> what the reader needs;  all of it -> every row
    for node in graph:
        needed in a span   ->  its operator on the rows of that span
        a token slice      ->  of the narrowed value, or gone
        else               ->  as it was

Before:  q = mm(n, wq); a = attention(q, k, v); y = mlp(x + a); logits = mm(norm(y), w)[:, -1:]
After:   r = x[:, -1:]; q = mm(norm(r), wq); a = attention(q, k, v, start=S - 1); y = mlp(r + a); logits = ...

Keys and values stay complete: an attention needs all of them for a single row of queries.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit, fake_value, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.min_cut import cheapest_cut
from mom_passes.graph.sizes import Size, count_hint, expr, hint, same
from mom_passes.graph.values import is_tensor, operands, value_of
from mom_passes.rules import Dim, Need, Rows, Window, claim_for, facts
from mom_passes.rules.calls import call_on_rows
from mom_passes.rules.view import TO_THE_END
from mom_passes.rules.views import is_cut
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.in_part import InPart, dead

aten = torch.ops.aten


@dataclass(frozen=True)
class Span:
    """Rows `[start, start + count)`; sympy expressions, so that equal spans are equal."""

    start: sympy.Expr
    count: sympy.Expr

    @property
    def end(self) -> sympy.Expr:
        return sympy.expand(self.start + self.count)

    def reaches(self, before: int) -> bool:
        """Whether the sequence certainly has so many rows ahead of the span."""
        first = sympy.expand(self.start - before)
        return before == 0 or bool(first.is_Integer and first >= 0)

    def read(self, need: Rows) -> Span:
        """The rows of an operand that these rows need."""
        return self if not need.before else Span(sympy.expand(self.start - need.before), self.count + need.before)

    def is_apart_from(self, other: Span) -> bool:
        """Whether two spans are known to have no row in common."""
        gaps = (sympy.expand(other.start - self.end), sympy.expand(self.start - other.end))
        return any(gap.is_Integer and gap >= 0 for gap in gaps)


#: A demand for rows of a value along one of its dimensions.
Piece = tuple[fx.Node, Dim, Span]

#: Somebody needs every row.
EVERY_ROW: None = None


def span_of(node: fx.Node, dim: Dim, length: Size) -> Span | None:
    """The rows a slice or select takes from an operand with tokens in `dim`; None if it is no token slice."""
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
    if end is None or (isinstance(end, int) and end >= TO_THE_END):
        return Span(sympy.expand(expr(length) - count), count)
    if start is None or (isinstance(start, int) and start >= 0):
        return Span(expr(start or 0), count)
    if isinstance(start, int) and isinstance(length, int):
        return Span(expr(max(0, length + start)), count)
    return None  # counted from the end of an unknown length: it may begin before the first row


def hull(a: Span, b: Span) -> Span | None:
    """The smallest span around two; None where it cannot be told for symbolic sizes."""
    start, end = b.start - a.start, b.end - a.end
    if not (start.is_Integer and end.is_Integer):
        return None
    low = b.start if start < 0 else a.start
    high = b.end if end > 0 else a.end
    return Span(low, sympy.expand(high - low))


@dataclass
class Needs:
    """Which rows of each token-carrying value its readers need. Values nobody reads are absent."""

    dims: TokenDims
    spans: dict[fx.Node, Span | None]

    def narrowed(self, node: fx.Node) -> Span | None:
        """The span in which a node is computed alone. What reads other rows than its own is computed whole."""
        span = self.spans.get(node) if node in self.dims.rowwise else None
        if span is None or node.target is operator.getitem:
            return span
        claim = claim_for(node, self.dims.carriers[node].dim, in_order=True)
        rows = [need for need in claim.needs if isinstance(need, Rows)]
        return span if not claim.carries and all(span.reaches(need.before) for need in rows) else None

    def add(self, node: fx.Node, span: Span | None) -> None:
        known = self.spans.get(node, span)
        both = None if known is None or span is None else hull(known, span)
        if both is not None and same(both.count, self.dims.carriers[node].length):
            both = EVERY_ROW
        self.spans[node] = both


def needed_rows(gm: fx.GraphModule, dims: TokenDims) -> Needs:
    """The spans of all values, from the outputs of the graph back."""
    needs = Needs(dims, {})
    for reader in reversed(gm.graph.nodes):
        for operand, span in _demands_of(reader, needs):
            if operand in dims.carriers:
                needs.add(operand, span)
    for node in dims.rowwise:
        # What one operator returns at once is made at once.
        if node.target is operator.getitem and node in needs.spans:
            needs.spans[node] = needs.spans[node.all_input_nodes[0]]
    return needs


def _demands_of(reader: fx.Node, needs: Needs) -> list[tuple[fx.Node, Span | None]]:
    """What a reader, itself needed in part or whole, needs of each operand."""
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
    claim = claim_for(reader, needs.dims.carriers[reader].dim)
    pairs = zip(operands(reader), claim.needs, strict=True)
    return [(n, _read(span, n, need, needs.dims)) for n, need in pairs]


def _read(span: Span, node: fx.Node, need: Need, dims: TokenDims) -> Span | None:
    """The rows of an operand that a span of the result needs, where these are along the operand's own token dim."""
    own = isinstance(need, Rows) and (node not in dims.carriers or dims.carriers[node].dim == need.dim)
    return span.read(need) if isinstance(need, Rows) and own else EVERY_ROW


def demanded_rows(gm: fx.GraphModule, dims: TokenDims) -> fx.GraphModule:
    """A new graph in which slices along the tokens have moved up; the same graph where there are none."""
    needs = needed_rows(gm, dims)
    if not any(needs.narrowed(node) is not None for node in needs.spans):
        return gm
    return _Narrower(gm, needs).run()


class _Narrower(InPart[Piece]):
    def __init__(self, gm: fx.GraphModule, needs: Needs) -> None:
        super().__init__(gm)
        self.needs = needs
        self.sliced = _where_to_slice(gm, needs)

    def is_in_part(self, node: fx.Node) -> bool:
        return self.needs.narrowed(node) is not None

    def taken(self, node: fx.Node) -> fx.Node | None:
        """A token slice of a narrowed value: what is left to cut off."""
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        if source is None or self.needs.narrowed(source) is None:
            return None
        carrier = self.needs.dims.carriers[source]
        span = span_of(node, carrier.dim, carrier.length)
        assert span is not None
        rows = self.rows((source, carrier.dim, span))
        if node.target is aten.select.int:
            rows = emit(self.graph, aten.select.int, (rows, carrier.dim.index, 0))
        return rows

    def make(self, piece: Piece) -> fx.Node:
        node, dim, span = piece
        own = self.needs.narrowed(node)
        if own is not None and own != span:
            inner = Span(sympy.expand(span.start - own.start), span.count)
            return self._slice(self.rows((node, dim, own)), dim, inner, own.count)
        if own is None and piece in self.sliced:
            return self._slice(self._whole(node), dim, span, None)
        claim = claim_for(node, dim)
        values = [
            self.rows((n, need.dim, span.read(need))) if isinstance(need, Rows) else self._whole(n)
            for n, need in zip(operands(node), claim.needs, strict=True)
        ]
        start, count = size_node(self.graph, span.start), size_node(self.graph, span.count)
        at = Window(start, count, tuple(self._first_row(span, need, start) for need in claim.needs))
        target, args, kwargs = call_on_rows(node, claim, at, values, self._whole)
        new = self.graph.create_node("call_function", target, args, kwargs, name=f"{node.name}_rows")
        new.meta = {**node.meta, "val": fake_value(new)}
        return new

    def _first_row(self, span: Span, need: Need, start: Any) -> Any:
        if not isinstance(need, Rows):
            return 0
        return size_node(self.graph, span.read(need).start) if need.before else start

    def _slice(self, value: fx.Node, dim: Dim, span: Span, length: Size | None) -> fx.Node:
        """Rows of a value. Tokens folded with other dimensions are unfolded first."""
        shape = list(value_of(value).shape)
        at = dim.index
        if not dim.plain:
            length = length if length is not None else _folded_length(shape[at], dim)
            unfolded = [*shape[:at], dim.outer, length, dim.inner, *shape[at + 1 :]]
            value, at = self._reshape(value, unfolded), at + 1
        start, end = size_node(self.graph, span.start), size_node(self.graph, span.end)
        rows = emit(self.graph, aten.slice.Tensor, (value, at, start, end))
        if not dim.plain:
            folded = expr(dim.outer) * span.count * expr(dim.inner)
            rows = self._reshape(rows, [*shape[: dim.index], folded, *shape[dim.index + 1 :]])
        return rows

    def _reshape(self, value: fx.Node, shape: list[Size]) -> fx.Node:
        return emit(self.graph, aten.reshape.default, (value, [size_node(self.graph, size) for size in shape]))


def _folded_length(size: Size, dim: Dim) -> Size:
    return sympy.cancel(expr(size) / (expr(dim.outer) * expr(dim.inner)))


def _where_to_slice(gm: fx.GraphModule, needs: Needs) -> set[Piece]:
    """Of the rows that narrowed operators read of values needed whole: which values are sliced.

    The others are made once more, on those rows alone, from what is sliced further up.
    """
    return cheapest_cut(_borders(gm, needs), _cost, lambda piece: _made_again_from(piece, needs))


def _borders(gm: fx.GraphModule, needs: Needs) -> list[Piece]:
    """Rows that narrowed operators read of values that are not narrowed."""
    found: dict[Piece, None] = {}
    for node in gm.graph.nodes:
        span = needs.narrowed(node)
        if span is None:
            continue
        claim = claim_for(node, needs.dims.carriers[node].dim)
        for operand, need in zip(operands(node), claim.needs, strict=True):
            if isinstance(need, Rows) and needs.narrowed(operand) is None:
                found[(operand, need.dim, span.read(need))] = None
    return list(found)


def _made_again_from(piece: Piece, needs: Needs) -> list[Piece] | None:
    """The operands' rows from which a cheap operator makes these rows once more; None if it is not cheap."""
    node, dim, span = piece
    if needs.narrowed(node) is not None:
        return None
    if not facts(node).recompute:
        return None
    try:
        claim = claim_for(node, dim)
    except CannotChunk:
        return None
    pairs = [(n, need) for n, need in zip(operands(node), claim.needs, strict=True) if isinstance(need, Rows)]
    if not all(span.reaches(need.before) for _, need in pairs):
        return None
    return [(n, need.dim, span.read(need)) for n, need in pairs]


def _cost(piece: Piece, order: int) -> int | None:
    return bytes_per_row(piece[0], piece[1], order)


def bytes_per_row(node: fx.Node, dim: Dim, order: int) -> int | None:
    """What it costs in a min-cut to keep a value whole for some rows of it: bytes per token, in thousandths; ties go to
    the readers' side.

    Inputs are there anyway. None for a tuple: its items can be sliced.
    """
    value = meta_value(node)
    tie = max(0, 999 - order)
    if not isinstance(value, torch.Tensor):
        return None
    if node.op in ("placeholder", "get_attr"):
        return tie
    per_token = count_hint(value.shape) * value.element_size() // max(1, hint(value.shape[dim.index]))
    return (1 if dim.plain else 2) * 1000 * max(1, per_token) + tie
