"""Recognise an attention that is written as two batched products with a softmax between them.

Terms
-----
scores      `queries @ keys`, `[.., R, T]`, from the first product to the softmax.
sink        An additional score for every row of a head, part of the softmax and sliced off after it.
of a row    A value that is constant along a row of scores: subtracting it changes no weight.
cap         Soft-capped scores: `c tanh(s / c)` for a score `s`.

    queries @ keys  [* scale]  [capped]  [+ mask]  [joined by sinks]  [- of a row]  softmax  [sinks cut off]  @ values

Matched from the second product back. Copies, casts and views that keep the last two dimensions may appear anywhere. No
other node may read a value between the two products, which would then be computed anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mom_passes.graph.aliasing import RESHAPES
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import Size, all_same, expr, is_one, product, same
from mom_passes.graph.values import derived_from, input_node, operand_chain, rank_of, value_of

aten = torch.ops.aten
prims = torch.ops.prims

COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)
_CAST = prims.convert_element_type.default
_KEEP_MATRICES = (*RESHAPES, aten.expand.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default)
_HEADS = 4
"""Rank of `[B, H, tokens, channels]`."""


#: Whether a cast from one dtype to another may be skipped.
Casts = Callable[[torch.dtype, torch.dtype], bool]


@dataclass
class Scores:
    """The operators between the first product, `of`, and the softmax. `factors` multiply or divide the scores."""

    of: fx.Node
    scale: float = 1.0
    factors: list[tuple[Any, fx.Node]] = field(default_factory=list)
    mask: fx.Node | None = None
    sinks: fx.Node | None = None
    softcap: float | None = None


@dataclass(frozen=True)
class Products:
    """An attention's operands, `[B, H, tokens, channels]`, sinks `[H]`; `results` are the nodes that it replaces."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float
    sinks: fx.Node | None
    softcap: float | None
    results: list[fx.Node]


def attention_of_products(second: fx.Node) -> Products | None:
    """The attention whose second product this is, or None. Inserts views of the operands ahead of the product."""
    weights, values = second.args
    results = [user for user in second.users if user.target in RESHAPES and rank_of(user) == _HEADS]
    if not results or len(results) < len(second.users):
        return None
    batch, heads, rows, channels = shape = value_of(results[0]).shape
    assert isinstance(weights, fx.Node) and isinstance(values, fx.Node)
    tokens = value_of(values).shape[1]
    if not all(all_same(value_of(result).shape, shape) for result in results):
        return None
    scores = _scores_of(weights, (batch, heads, rows, tokens))
    if scores is None or not _is_read_only_by(scores.of, second):
        return None
    queries, keys = scores.of.args
    assert isinstance(queries, fx.Node) and isinstance(keys, fx.Node)
    inner = value_of(queries).shape[2]
    if not all(same(product((batch, heads)), value_of(node).shape[0]) for node in (queries, values)):
        return None
    dtype = value_of(values).dtype
    with second.graph.inserting_before(second):
        query = _by_heads(queries, (batch, heads, rows, inner), dtype)
        key = _transposed(_by_heads(keys, (batch, heads, inner, tokens), dtype))
        key = _by_heads(key, (batch, heads, tokens, inner), dtype)
        value = _by_heads(values, (batch, heads, tokens, channels), dtype)
        for target, factor in scores.factors:
            query = emit(second.graph, target, (query, factor))
        sinks = None if scores.sinks is None else _vector(scores.sinks, heads)
    if {value_of(one).dtype for one in (query, key)} != {dtype}:
        return None
    return Products(query, key, value, scores.mask, scores.scale, sinks, scores.softcap, results)


def _scores_of(weights: fx.Node, shape: Sequence[Size]) -> Scores | None:
    """The scores whose softmax these weights are: `[B, H, R, T]`, or `T + 1` columns of which a sink is sliced off."""
    node, joined = _through(weights, _any), False
    if node.target is aten.slice.Tensor and all_same(value_of(node).shape, shape):
        if argument(node, "start") not in (0, None) or argument(node, "step") != 1:
            return None
        node, joined = _through(argument(node, "self"), _any), True
    softmaxed = _softmaxed(node)
    if softmaxed is None or not all_same(value_of(node).shape, (*shape[:3], expr(shape[3]) + int(joined))):
        return None
    node = _without_numbers_of_a_row(softmaxed)
    sinks = None
    if joined:
        if node.target is not aten.cat.default or axis(argument(node, "dim"), rank_of(node)) != _HEADS - 1:
            return None
        node, sinks = argument(node, "tensors") if len(argument(node, "tensors")) == 2 else (node, None)
        if sinks is None or not _is_of_heads(sinks, shape[1]) or not all_same(value_of(node).shape, shape):
            return None
    found = _masked(_without_numbers_of_a_row(node) if not joined else _through(node), shape)
    if found is not None:
        found.sinks = sinks
    return found


def _masked(node: fx.Node, shape: Sequence[Size]) -> Scores | None:
    """Scores and an additive mask, which may be either operand."""
    alone = _capped(node)
    if alone is not None:
        return alone
    if node.target is not aten.add.Tensor or argument(node, "alpha") != 1:
        return None
    for scores, mask in (node.args, reversed(node.args)):
        if not isinstance(scores, fx.Node) or not isinstance(mask, fx.Node):
            return None
        found = _capped(_through(scores))
        if found is not None and _is_a_mask(mask) and all_same(value_of(scores).shape, shape):
            found.mask = mask
            return found
    return None


def _capped(node: fx.Node) -> Scores | None:
    """Scores, soft-capped or not: `c tanh(s / c)`, where the division by c is one of the factors of `s`."""
    cap = node.args[1] if node.target is aten.mul.Tensor else None
    if not isinstance(cap, int | float):
        return _scaled(node)
    bounded = input_node(node)
    bound = _through(bounded)
    if bound.target is not aten.tanh.default:
        return _scaled(node)
    if not all_same(value_of(bounded).shape, value_of(node).shape):
        return _scaled(node)
    found = _scaled(_through(argument(bound, "self")))
    if found is None or cap <= 0:
        return None
    found.softcap, found.scale = float(cap), found.scale * float(cap)
    return found


def _scaled(node: fx.Node) -> Scores | None:
    """The first product and its factors."""
    scale, factors = 1.0, []
    while node.target in (aten.mul.Tensor, aten.div.Tensor):
        scores, factor = node.args
        if isinstance(factor, fx.Node):
            if not isinstance(meta_value(factor), torch.Tensor) or value_of(factor).dim():
                return None
            factors.append((node.target, factor))
        else:
            assert isinstance(factor, int | float)
            scale = scale * factor if node.target is aten.mul.Tensor else scale / factor
        assert isinstance(scores, fx.Node)
        node = _through(scores)
    return Scores(node, scale, factors[::-1]) if node.target is aten.bmm.default else None


def _softmaxed(node: fx.Node) -> fx.Node | None:
    """The operand of a softmax over the last dimension, as one operator or decomposed."""
    last = rank_of(node) - 1
    if node.target is aten._softmax.default:
        return argument(node, "self") if axis(argument(node, "dim"), last + 1) == last else None
    if node.target is not aten.div.Tensor:
        return None
    powers, sums = node.args
    if not isinstance(powers, fx.Node) or not isinstance(sums, fx.Node) or powers.target is not aten.exp.default:
        return None
    if sums.target is not aten.sum.dim_IntList or argument(sums, "self") is not powers:
        return None
    over = [axis(dim, last + 1) for dim in argument(sums, "dim")]
    return argument(powers, "self") if over == [last] and argument(sums, "keepdim") else None


def _without_numbers_of_a_row(node: fx.Node) -> fx.Node:
    """Scores before a value constant along each row, such as the maximum, is subtracted."""
    while True:
        node = _through(node)
        scores, number = node.args[:2] if node.target is aten.sub.Tensor else (None, None)
        if not isinstance(scores, fx.Node) or not isinstance(number, fx.Node) or argument(node, "alpha") != 1:
            return node
        shape = value_of(number).shape
        if (len(shape) and not is_one(shape[-1])) or not all_same(value_of(scores).shape, value_of(node).shape):
            return node
        node = scores


def _is_a_mask(node: fx.Node) -> bool:
    """Whether a summand of scores may be an additive mask: floating, four-dimensional."""
    value = meta_value(node)
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point and value.dim() == _HEADS


def _unexpanded(node: fx.Node) -> fx.Node:
    """The operand of a chain of copies, casts and expansions."""
    return operand_chain(node, lambda value: value.target in (*COPIES, _CAST, aten.expand.default))[-1]


def _is_of_heads(node: fx.Node, heads: Size) -> bool:
    """Whether a value has one number for each head, the same for all batch entries and rows."""
    shape = value_of(_unexpanded(node)).shape
    ones = len(shape) == _HEADS and all(is_one(shape[d]) for d in (0, 2, 3))
    return ones and (same(shape[1], heads) or is_one(shape[1]))


def _vector(node: fx.Node, heads: Size) -> fx.Node:
    """The sinks as a vector `[H]`."""
    node = _unexpanded(node)
    if node.target in RESHAPES and all_same(value_of(input_node(node)).shape, (heads,)):
        return input_node(node)
    graph, size = node.graph, size_node(node.graph, heads)
    if not same(value_of(node).shape[1], heads):
        node = emit(graph, aten.expand.default, (node, [1, size, 1, 1]))
    return emit(graph, aten.reshape.default, (node, [size]))


def _through(node: fx.Node, casts: Casts | None = None) -> fx.Node:
    """The source of scores through copies, casts and views that fold their leading dimensions."""
    return list(_sources(node, casts or _keeps_range))[-1]


def _any(old: torch.dtype, new: torch.dtype) -> bool:
    """Weights are between zero and one: every cast may be skipped."""
    return True


def _keeps_range(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether finite numbers stay finite: float64's smallest number is -inf in float32."""
    return torch.finfo(new).smallest_normal <= torch.finfo(old).smallest_normal


def _sources(node: fx.Node, casts: Casts) -> Iterator[fx.Node]:
    """A value, and in turn the sources of copies, such casts, and views that keep the last two dimensions."""
    while True:
        yield node
        source: Any = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not isinstance(meta_value(source), torch.Tensor):
            return
        old, new = meta_value(source), meta_value(node)
        if node.target is _CAST:
            if not old.dtype.is_floating_point or not casts(old.dtype, new.dtype):
                return
        elif node.target not in COPIES and not (node.target in _KEEP_MATRICES and _same_matrices(old, new)):
            return
        node = source


def _same_matrices(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether a view folds only leading dimensions: the same number of matrices of the same shape, in order."""
    if min(old.dim(), new.dim()) < 2 or not all_same(old.shape[-2:], new.shape[-2:]):
        return False
    return same(product(old.shape[:-2]), product(new.shape[:-2]))


def _by_heads(node: fx.Node, shape: Sequence[Size], dtype: torch.dtype) -> fx.Node:
    """An operand of a product with batch and heads as separate dimensions: a source of it, or a new view."""
    sources = _sources(node, lambda old, new: old == dtype)
    found = [source for source in sources if all_same(value_of(source).shape, shape)]
    if found:
        return found[-1]
    return emit(node.graph, aten.reshape.default, (node, [size_node(node.graph, size) for size in shape]))


def _transposed(node: fx.Node) -> fx.Node:
    swapped = [0, 1, 3, 2]
    if node.target is aten.permute.default and [axis(d, _HEADS) for d in argument(node, "dims")] == swapped:
        return input_node(node)
    return emit(node.graph, aten.permute.default, (node, swapped))


def _is_read_only_by(first: fx.Node, second: fx.Node) -> bool:
    """Whether every path from the first product leads only to the second."""
    derived = derived_from(first, lambda user: user is not second)
    return all(user.op == "call_function" and user.target is not aten.bmm.default for user in derived)
