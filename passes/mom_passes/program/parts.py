"""Which outputs of a graph are parts of larger storages whose other rows are not returned. An analysis.

Terms
-----
base      The value of an operator or a loop that owns a storage.
cut       The last narrowing view between a base and an output: a slice, a select, one piece of a split.
part      The rows of a base that one or more outputs show. Outputs whose rows overlap are one part, so that a write to
          one is still visible in the other.
cover     The rows of a part: its cut, or the smallest slice that contains its cuts.

    for each base whose outputs are all narrower than it:
        no part if it is an input's storage, or if an operator writes to it
        parts   = its cuts, overlapping ones together
        they are worth a copy if it frees more than an eighth of the base

A decode step that drops one row of a window does not copy the window: `cat([past, new])[-w:]` stays a view. Sizes are
compared without guards: rows of unbounded number, as those before the window of a prompt of any length, are worth it.

The copy of a value's last w rows has room for one row before them. It then has the strides of `cat([past, new])[-w:]`:
the graph of a decode step, whose guards include strides, serves the first step after a prompt and all later ones.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mom_passes.graph.aliasing import base_of, is_mutation, view_chain, views_of
from mom_passes.graph.arguments import argument
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, count_hint, expr, product, same
from mom_passes.graph.values import bytes_of, operands, rank_of, value_of
from mom_passes.graph.writes import written_by
from mom_passes.ops.rows import LEAST_WITH_ROOM
from mom_passes.ops.transfers import APPEND, OFFLOAD
from mom_passes.rules import Dim
from mom_passes.rules.view import TO_THE_END
from mom_passes.rules.views import is_cut
from mom_passes.tokens.demanded_rows import Span, hull, span_of

aten = torch.ops.aten

#: At most 1 / MOST_WASTE of a base may stay allocated without readers: a copy costs time too.
MOST_WASTE = 8

#: Operators whose results are not device storages.
NO_BASE = frozenset({OFFLOAD, APPEND})


@dataclass(frozen=True)
class Part:
    """Rows of a base that `outputs` show, each through one of `cuts`.

    The rows are those of `cover`, or its rows `[start, end)` along `dim`. `cuts` maps a cut to its rows of these along
    `dim`, `[first, end)`, or None for all.
    """

    base: fx.Node
    cover: fx.Node
    dim: int
    rows: tuple[int, int] | None
    cuts: dict[fx.Node, tuple[int, int] | None]
    outputs: dict[fx.Node, fx.Node]

    @property
    def shape(self) -> tuple[Size, ...]:
        shape = list(value_of(self.cover).shape)
        if self.rows is not None:
            shape[self.dim] = self.rows[1] - self.rows[0]
        return tuple(shape)

    @property
    def room(self) -> int | None:
        """The dimension in which the copy has an additional row, or None."""
        cut = self.cover
        if cut.target is not aten.slice.Tensor or self.rows is not None or set(self.cuts) != {cut}:
            return None
        dim = int(argument(cut, "dim")) % rank_of(cut)
        count, rows = value_of(cut).shape[dim], value_of(operands(cut)[0]).shape[dim]
        span = span_of(cut, Dim(dim), rows)
        last = span is not None and same(span.end, rows)
        return dim if last and isinstance(count, int) and count >= LEAST_WITH_ROOM else None

    @property
    def bytes(self) -> int:
        """Bytes of the rows, at the captured sizes."""
        return count_hint(self.shape) * int(value_of(self.cover).element_size())


def find_parts(gm: fx.GraphModule) -> tuple[Part, ...]:
    """The parts that are worth a copy, by base in graph order. The graph is not changed."""
    outputs_of: dict[fx.Node, list[fx.Node]] = {}
    for node in gm.graph.output_node().all_input_nodes:
        if isinstance(meta_value(node), torch.Tensor):
            outputs_of.setdefault(base_of(node), []).append(node)
    found: list[Part] = []
    for base, outputs in sorted(outputs_of.items(), key=lambda item: item[0]):
        if base.op != "call_function" or base.target in NO_BASE or _is_written(base):
            continue
        parts = _parts_of(base, outputs)
        if parts and _worth_copying(base, parts):
            found += parts
    return tuple(found)


def _is_written(base: fx.Node) -> bool:
    views = views_of(base)
    return any(is_mutation(user) and not views.isdisjoint(written_by(user)) for view in views for user in view.users)


# --- cuts and how they overlap ---


def _parts_of(base: fx.Node, outputs: Sequence[fx.Node]) -> list[Part]:
    """No parts if an output shows all of the base, or if it is not known whether outputs overlap."""
    chains = {output: view_chain(output) for output in outputs}
    cuts = {output: _last_cut(chain) for output, chain in chains.items()}
    known = set(cuts.values())
    # A cut of a cut is a view of the outer cut's copy.
    outermost = {output: [node for node in chain if node in known][-1:] for output, chain in chains.items()}
    cut_of = {output: found[0] for output, found in outermost.items() if found}
    if len(cut_of) < len(outputs) or any(by_storage(cut) and cut not in cut_of.values() for cut in known):
        return []
    distinct = sorted(set(cut_of.values()))
    return [
        Part(base, cover, dim, rows, inner, {output: cut for output, cut in cut_of.items() if cut in inner})
        for cover, dim, rows, inner in _covers(distinct)
    ]


def _last_cut(chain: Sequence[fx.Node]) -> fx.Node | None:
    """The narrowing view of a chain that is nearest to the output."""
    for node, source in itertools.pairwise(chain):
        if node.target is operator.getitem or by_storage(node):
            return node
        if bytes_of(node) < bytes_of(source):
            return node
    return None


def by_storage(node: fx.Node | None) -> bool:
    """Whether a view's offset is relative to its storage (`as_strided`): it cannot be taken of a copy."""
    return node is not None and node.target is aten.as_strided.default


#: Fields of `Part`: cover, dim, rows, cuts.
Cover = tuple[fx.Node, int, tuple[int, int] | None, dict[fx.Node, tuple[int, int] | None]]


def _covers(cuts: Sequence[fx.Node]) -> list[Cover]:
    """A cover for each cut if no two overlap, else one for all; none if that is not known."""
    if len(cuts) == 1:
        return [(cuts[0], 0, None, {cuts[0]: None})]
    source, dim = cuts[0].args[0], _dim_of(cuts[0])
    assert isinstance(source, fx.Node)
    if dim is None or any(cut.args[0] is not source or _dim_of(cut) != dim for cut in cuts):
        return []
    spans = {cut: span_of(cut, Dim(dim), value_of(source).shape[dim]) for cut in cuts}
    known = {cut: span for cut, span in spans.items() if span is not None}
    if len(known) < len(spans):
        return []
    if all(a.is_apart_from(b) for a, b in itertools.combinations(known.values(), 2)):
        return [(cut, 0, None, {cut: None}) for cut in cuts]
    first, *others = known.values()
    around: Span | None = first
    for span in others:
        around = hull(around, span) if around is not None else None
    inner = {cut: _within(span, around) for cut, span in known.items()} if around is not None else {}
    if around is None or None in inner.values():
        return []
    widest = next((cut for cut, span in known.items() if span == around and cut.target is aten.slice.Tensor), None)
    if widest is not None:
        return [(widest, dim, None, {**inner, widest: None})]
    if not (around.start.is_Integer and around.count.is_Integer):
        return []
    return [(source, dim, (int(around.start), int(around.end)), inner)]


def _dim_of(cut: fx.Node) -> int | None:
    """The dimension of a slice or select."""
    if not is_cut(cut):
        return None
    return int(argument(cut, "dim")) % rank_of(operands(cut)[0])


def _within(span: Span, around: Span) -> tuple[int, int] | None:
    """The rows of a span within a larger one, if they are the same for all sizes."""
    first = sympy.expand(span.start - around.start)
    if not first.is_Integer:
        return None
    if same(span.end, around.end):
        return int(first), TO_THE_END
    return (int(first), int(first + span.count)) if span.count.is_Integer else None


# --- whether a copy is worth it ---


def _worth_copying(base: fx.Node, parts: Sequence[Part]) -> bool:
    """Whether more than an eighth of a base would stay allocated without readers, at the captured or at other sizes."""
    if bytes_of(base) == 0:
        return False
    size = value_of(base).element_size()
    kept = sum(expr(product(part.shape)) * value_of(part.cover).element_size() for part in parts)
    waste = sympy.cancel(1 - kept / (expr(product(value_of(base).shape)) * size))
    numerator, _ = sympy.fraction(sympy.together(waste))
    hinted = bytes_of(base) - sum(part.bytes for part in parts)
    bounded = not numerator.free_symbols or _grows_by_a_few_rows(base)
    return hinted * MOST_WASTE > bytes_of(base) if bounded else hinted > 0


def _grows_by_a_few_rows(base: fx.Node) -> bool:
    """Whether a value is a past with a fixed number of new rows. The rows that a window drops of it are as few.

    The past's length is a symbol in a graph; the cache has already cropped it to its window.
    """
    if base.target is not aten.cat.default:
        return False
    tensors = argument(base, "tensors")
    dim = int(argument(base, "dim")) % rank_of(base)
    new = [n for n in tensors if base_of(n).op != "placeholder"]
    return len(new) < len(tensors) and all(isinstance(value_of(n).shape[dim], int) for n in new)
