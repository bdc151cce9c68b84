"""Recognise operators that index the token dimension with a tensor.

Terms
-----
pick      `x[arange(B), last]`, `x[:, rows]`, `x.gather(1, rows.expand(..))`, `index_select`, `embedding(rows, x)`: rows
          of `x` along its tokens with numbers that are known at run time only.
picks     The row numbers: `count` per batch entry, or `count` that all entries share. In any order, with repetitions.

    hidden[arange(B), last]      source hidden, tokens 1, batch 0, count 1
    logits[:, rows]              source logits, tokens 1, the same rows for all
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mom_passes.graph.arguments import argument, axis, overloads
from mom_passes.graph.sizes import expr, hint, is_one, product, same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import Dim
from mom_passes.rules.view import locate
from mom_passes.tokens.dims import TokenDims
from mom_passes.tokens.sweep import Carrier

aten = torch.ops.aten
IOTA = torch.ops.prims.iota.default
#: Operators that repeat their operand's elements.
SPREADING = (aten.expand.default, aten.repeat.default)
#: Operators that keep their operand's elements in order.
RESHAPING = (
    *overloads(aten, "alias clone reshape squeeze.dim squeeze.dims unsqueeze view _unsafe_view _to_copy"),
    torch.ops.prims.convert_element_type.default,
)


@dataclass(frozen=True)
class Picks:
    """Row numbers: `index` holds `entries x count` of them, or `count` for all entries if `entries` is None.

    `length` is the number of rows to pick from. With `wraps`, -1 is the last row.
    """

    index: fx.Node
    entries: sympy.Expr | None
    count: sympy.Expr
    length: sympy.Expr
    wraps: bool

    @property
    def flat_count(self) -> sympy.Expr:
        """The number of row numbers of all entries."""
        return self.count if self.entries is None else sympy.expand(self.entries * self.count)


@dataclass(frozen=True)
class Pick:
    """Rows of `source` along `dim`, different ones for each entry along `batch`, or the same if `batch` is None."""

    source: fx.Node
    dim: Dim
    batch: Dim | None
    picks: Picks


def pick_of(node: fx.Node, dims: TokenDims) -> Pick | None:
    """Return the pick that an operator computes, None if it is none or picks more than half of the rows."""
    find = _KINDS.get(node.target) if node.op == "call_function" else None
    if find is None:
        return None
    source = argument(node, "weight" if node.target is aten.embedding.default else "self")
    carrier = dims.carriers.get(source)
    if carrier is None or not carrier.dim.plain:
        return None
    found = find(node, source, carrier)
    if found is None or found.source is found.picks.index or 2 * hint(found.picks.count) > hint(carrier.length):
        return None
    return found


def _shared(source: fx.Node, carrier: Carrier, index: fx.Node, *, wraps: bool) -> Pick:
    count = expr(product(value_of(index).shape))
    return Pick(source, carrier.dim, None, Picks(index, None, count, expr(carrier.length), wraps))


def _own(source: fx.Node, carrier: Carrier, index: fx.Node, batch: int, count: Any, *, wraps: bool) -> Pick:
    """Return a pick with rows per entry along `batch`, or a shared one if there is one entry."""
    entries = value_of(source).shape[batch]
    if is_one(entries):
        return _shared(source, carrier, index, wraps=wraps)
    return Pick(source, carrier.dim, Dim(batch), Picks(index, expr(entries), expr(count), expr(carrier.length), wraps))


def _by_index(node: fx.Node, source: fx.Node, carrier: Carrier) -> Pick | None:
    """`x[:, rows]`, or `x[arange(B), rows]`."""
    indices = {at: one for at, one in enumerate(argument(node, "indices")) if one is not None}
    at = carrier.dim.index
    if at not in indices or any(not _is_integer(one) for one in indices.values()):
        return None
    if indices.keys() == {at}:
        return _shared(source, carrier, indices[at], wraps=True)
    batch = at - 1
    if indices.keys() != {batch, at}:
        return None
    numbers, rows = indices[batch], indices[at]
    rank = value_of(node).dim() - (value_of(source).dim() - 2)
    along = _counts_along(numbers, value_of(source).shape[batch])
    # `[B]`, or `[B, K]`: entries come first.
    if along != 0 or rank > 2 or value_of(numbers).dim() != rank:
        return None
    shape = [expr(size) for size in value_of(node).shape[batch : batch + rank]]
    return _of_entries(source, carrier, rows, batch, shape)


def _of_entries(source: fx.Node, carrier: Carrier, rows: fx.Node, batch: int, shape: list[sympy.Expr]) -> Pick | None:
    """Return the pick of row numbers that are broadcast to `[B]` or `[B, K]`."""
    count = shape[1] if len(shape) == 2 else sympy.Integer(1)
    given = [*[1] * (len(shape) - value_of(rows).dim()), *value_of(rows).shape]
    total = product(given)
    if same(total, shape[0] * count):
        return _own(source, carrier, rows, batch, count, wraps=True)
    if is_one(given[0]) and same(total, count):
        return _shared(source, carrier, rows, wraps=True)
    return None


def _by_gather(node: fx.Node, source: fx.Node, carrier: Carrier) -> Pick | None:
    """`x.gather(1, rows[:, :, None].expand(-1, -1, H))`: the same rows along all other dimensions."""
    index, at = argument(node, "index"), carrier.dim.index
    shape, rank = value_of(source).shape, value_of(source).dim()
    if rank == 0 or axis(argument(node, "dim"), rank) != at:
        return None
    if any(not same(size, shape[d]) for d, size in enumerate(value_of(index).shape) if d != at):
        return None
    rows = _before_spreading(index)
    own = [d for d, size in enumerate(value_of(rows).shape) if d != at and not is_one(size)]
    count = value_of(rows).shape[at]
    if not own:
        return _shared(source, carrier, rows, wraps=False)
    return _own(source, carrier, rows, own[0], count, wraps=False) if len(own) == 1 and own[0] < at else None


def _by_index_select(node: fx.Node, source: fx.Node, carrier: Carrier) -> Pick | None:
    if axis(argument(node, "dim"), value_of(source).dim()) != carrier.dim.index:
        return None
    return _shared(source, carrier, argument(node, "index"), wraps=False)


def _by_embedding(node: fx.Node, source: fx.Node, carrier: Carrier) -> Pick | None:
    return _shared(source, carrier, argument(node, "indices"), wraps=False) if carrier.dim.index == 0 else None


_KINDS: dict[Any, Callable[[fx.Node, fx.Node, Carrier], Pick | None]] = {
    aten.index.Tensor: _by_index,
    aten.gather.default: _by_gather,
    aten.index_select.default: _by_index_select,
    aten.embedding.default: _by_embedding,
}


def _is_integer(node: fx.Node) -> bool:
    return value_of(node).dtype in (torch.int64, torch.int32)


def _before_spreading(node: fx.Node) -> fx.Node:
    """Return the value of the same rank that a value repeats along dimensions of size one, or the value itself."""
    source = node
    while source.op == "call_function" and (source.target in SPREADING or source.target is aten.clone.default):
        operand = operands(source)[0]
        pairs = zip(value_of(operand).shape, value_of(source).shape, strict=False)
        if value_of(operand).dim() != value_of(source).dim() or not all(same(a, b) or is_one(a) for a, b in pairs):
            break
        source = operand
    return source


def _counts_along(node: fx.Node, length: Any) -> int | None:
    """Return the dimension along which an index is 0, 1, .., `length - 1` and otherwise constant, or None."""
    if node.op != "call_function":
        return None
    if node.target is IOTA:
        counts = node.kwargs.get("start") == 0 and node.kwargs.get("step") == 1
        return 0 if counts and same(value_of(node).shape[0], length) else None
    if node.target not in (*RESHAPING, aten.expand.default) or not _is_integer(node):
        return None
    operand = operands(node)[0]
    along = _counts_along(operand, length)
    if along is None:
        return None
    if node.target is aten.expand.default:
        along += value_of(node).dim() - value_of(operand).dim()
        return along if same(value_of(node).shape[along], length) else None
    at = locate(Dim(along), value_of(operand).shape, value_of(node).shape)
    return at.index if at is not None and at.plain and _only_adds_ones(operand, node) else None


def _only_adds_ones(operand: fx.Node, node: fx.Node) -> bool:
    """Whether a value differs from its operand by dimensions of size one only."""
    before, after = ([expr(n) for n in value_of(one).shape if not is_one(n)] for one in (operand, node))
    return before == after
