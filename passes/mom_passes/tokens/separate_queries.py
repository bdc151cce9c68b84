"""Give the queries of an attention a product of their own, where one product computes queries, keys and values.

All rows of keys and values must be stored before the first query can attend to them. A product that computes all three
makes the queries one more value that is stored for all tokens. With a product of their own, the stage after the barrier
computes them from the hidden states, row by row. The products read slices of the same weight, so no weight is copied.

    Phi-3, Falcon             slices or a split of the product's features
    GPT-2, vision towers      a view `[.., 3, heads, D]` of the features, and `select` or `unbind` along the 3
    BLOOM, GPT-NeoX           `[.., heads, 3, D]`: the queries are no range of features, and the product stays

Before:  p = addmm(b, x, w);                     q, k, v = split(p, [n, m, m], 1)
After:   q = addmm(b[:n], x, w[:, :n]);          k = addmm(b[n:n + m], x, w[:, n:n + m]);          v = ...
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.claimed_layouts import correct_strides
from mom_passes.graph.edit import copy_graph, emit
from mom_passes.graph.sizes import same
from mom_passes.graph.values import operands, value_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.transfers import ARRIVING
from mom_passes.rules.work import matmul_work

#: Products of rows with a weight `[K, N]`, without and with a bias.
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int)


@dataclass(frozen=True)
class _Part:
    """A value that is the features `[first, first + count)` of a product, `layout` times `taken` along one dimension.

    node      the value
    views     the views between the product and the value, first the nearest to the product
    shape     of the first view, with the part's size along the dimension that is cut
    selected  the dimension of the last view that `node` does not have, None if it has all
    """

    node: fx.Node
    views: tuple[fx.Node, ...]
    shape: tuple[Any, ...]
    first: int
    count: int
    selected: int | None


def separate_queries(gm: fx.GraphModule) -> fx.GraphModule:
    """Return the graph, or a copy in which queries have products of their own."""
    if any(node.target in ARRIVING for node in gm.graph.nodes):  # a weight on the host would be fetched for each part
        return gm
    if not any(_parts_with_queries(node) for node in gm.graph.nodes):
        return gm
    gm = copy_graph(gm)
    replaced: list[fx.Node] = []
    for node in list(gm.graph.nodes):
        for part in _parts_with_queries(node):
            replaced.append(_emit(node, part))
    gm.graph.eliminate_dead_code()
    correct_strides(gm, replaced)
    gm.recompile()
    return gm


def _parts_with_queries(product: fx.Node) -> list[_Part]:
    """Return the parts of a product, if some are queries alone and the others keys and values; else none."""
    if product.target not in _PRODUCTS or not _is_plain(product):
        return []
    found = list(_parts(product, product, ()))
    parts = [part for part in found if part is not None]
    read = [_read_as(part.node) for part in parts]
    kinds = {frozenset(names) for names in read}
    if len(parts) != len(found) or frozenset({"query"}) not in kinds or len(kinds) < 2:
        return []
    return [] if any("query" in names and len(names) > 1 for names in read) or not all(read) else parts


def _is_plain(product: fx.Node) -> bool:
    if product.target is aten.mm.default:
        return True
    bias, scales = product.args[0], {argument(product, name) for name in ("beta", "alpha")}
    return scales == {1} and isinstance(bias, fx.Node) and value_of(bias).dim() == 1


def _parts(product: fx.Node, node: fx.Node, views: tuple[fx.Node, ...]) -> Iterator[_Part | None]:
    """Yield the parts of a product that are read, None for a reader of any other kind. `views` are a view, if any, and
    a permutation, if any."""
    for user in node.users:
        permuted = bool(views) and views[-1].target is aten.permute.default
        if user.target is aten.view.default and not permuted:
            yield from _parts(product, user, (user,))  # a view of a view is one of the product
        elif user.target is aten.permute.default and not permuted:
            yield from _parts(product, user, (*views, user))
        elif user.target in _SPLITS:
            yield from (_part(product, item, user, views, item.args[1]) for item in user.users)
        elif user.target in (aten.slice.Tensor, aten.select.int):
            yield _part(product, user, user, views, 0)
        else:
            yield None


def _part(product: fx.Node, node: fx.Node, cut: fx.Node, views: tuple[fx.Node, ...], number: Any) -> _Part | None:
    source = value_of(cut.args[0])  # type: ignore[arg-type]
    dim = axis(argument(cut, "dim"), source.dim())
    size = source.shape[dim]
    if not isinstance(size, int) or (cut.target in _SPLITS and node.target is not operator.getitem):
        return None
    low, count = _range(cut, number, size)
    if low is None:
        return None
    place = _place(product, views, dim)
    if place is None:
        return None
    at, shape = place
    inner = math.prod(shape[at + 1 :])
    shape = (*shape[:at], count, *shape[at + 1 :])
    selected = dim if cut.target in (aten.select.int, aten.unbind.int) else None
    return _Part(node, views, shape, low * inner, count * inner, selected)


def _range(cut: fx.Node, number: int, size: int) -> tuple[int | None, int]:
    """Return the first index along the cut dimension, None if it is no range, and how many."""
    if cut.target is aten.unbind.int:
        return number, 1
    if cut.target is aten.split_with_sizes.default:
        sizes = argument(cut, "split_sizes")
        return sum(sizes[:number]), sizes[number]
    if cut.target is aten.split.Tensor:
        count = argument(cut, "split_size")
        return (number * count, min(count, size - number * count)) if isinstance(count, int) else (None, 0)
    if cut.target is aten.select.int:
        index = argument(cut, "index")
        return (index % size, 1) if isinstance(index, int) else (None, 0)
    start, end, step = argument(cut, "start") or 0, argument(cut, "end"), argument(cut, "step")
    if step != 1 or not isinstance(start, int) or not isinstance(end, int | None):
        return None, 0
    low, high, _ = slice(start, end).indices(size)
    return low, max(0, high - low)


def _place(product: fx.Node, views: tuple[fx.Node, ...], dim: int) -> tuple[int, tuple[Any, ...]] | None:
    """Return the dimension before the permutation that the dimension `dim` is, and the shape that it is in; None if
    its indices are not ranges of the product's features."""
    for view in reversed(views):
        if view.target is aten.permute.default:
            dims = argument(view, "dims")
            dim = axis(dims[dim], len(dims))
    # Without a view in front, the permutation is of the product itself.
    first = views[0] if views and views[0].target is aten.view.default else product
    shape = tuple(value_of(first).shape)
    features = _features(shape, value_of(product).shape[1])
    if features is None or dim < features or any(size != 1 for size in shape[features:dim]):
        return None
    return dim, shape


def _features(shape: tuple[Any, ...], count: Any) -> int | None:
    """Return the first of the last dimensions of a shape that together are the features."""
    for first in range(len(shape) - 1, -1, -1):
        own = shape[first:]
        if all(isinstance(size, int) for size in own) and same(math.prod(own), count):
            return first
    return None


def _read_as(value: fx.Node) -> set[str]:
    """Return as which operands attentions read a value, or what other rows are computed from it; empty if another
    product or a result of the graph reads it."""
    names, pending, seen = set[str](), [value], {value}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target is MOM_ATTENTION:
                names |= {name for name in ("query", "key", "value") if argument(user, name) is node}
            elif matmul_work(user):
                return set()
            elif user.op != "output" and user not in seen:
                seen.add(user)
                pending.append(user)
    return names


def _emit(product: fx.Node, part: _Part) -> fx.Node:
    """Emit the product for a part and the views of it. Return the value in the part's place."""
    graph, node = product.graph, part.node
    *bias, rows, weight = operands(product)
    low, high = part.first, part.first + part.count
    with graph.inserting_before(product.next):
        weight = emit(graph, aten.slice.Tensor, (weight, 1, low, high))
        bias = [emit(graph, aten.slice.Tensor, (one, 0, low, high)) for one in bias]
        new = emit(graph, product.target, (*bias, rows, weight))
        new.meta = {**product.meta, "val": new.meta["val"]}
    with graph.inserting_before(node):
        if part.views and part.views[0].target is aten.view.default:
            new = emit(graph, aten.view.default, (new, _sizes(part)))
        for view in part.views:
            if view.target is aten.permute.default:
                new = emit(graph, aten.permute.default, (new, argument(view, "dims")))
        if part.selected is not None:
            new = emit(graph, aten.select.int, (new, part.selected, 0))
    node.replace_all_uses_with(new)
    return new


def _sizes(part: _Part) -> list[Any]:
    """Return the arguments of the first view with the part's own size; sizes that are nodes stay nodes."""
    pairs = zip(part.shape, argument(part.views[0], "size"), strict=True)
    return [size if isinstance(size, fx.Node) else own for own, size in pairs]
