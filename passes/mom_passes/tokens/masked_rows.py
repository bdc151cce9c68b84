"""Replace writes of consecutive source rows where a mask is true by a gather of rows and a `where`.

Such a write reads the source in the order of the mask's true entries, so no operator of it is row-wise. As a gather,
the rows of its result need the rows of `x` and of a running count.

Before:  y = masked_scatter(x, expand(unsqueeze(mask, -1)), source)        x [B, S, H], mask [B, S]
         y = index_put(x, [mask], source)
         y = index_put(x, [mask], index(x, [mask]) + source)
After:   at = clamp(count(mask) - 1, 0, N - 1)                             the running count, across sequences
         y = where(unsqueeze(mask, -1), index(view(source, [N, H]), [at]), x)
         y = where(unsqueeze(mask, -1), x + index(source, [at]), x)        for the last form
         _assert_async(sum(mask) <= N)

Inductor decomposes `masked_scatter` into operators on one dimension for GPUs. That form is recognised, too. A
`masked_scatter` stays as it is if its mask differs within a row, if its source has no element, or may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, argument_node, aten, prims
from mom_passes.graph.data_dependent import is_unknown
from mom_passes.graph.edit import emit, emit_view, size_node
from mom_passes.graph.sizes import Size, all_same, expr, hint, is_one, product, quotient, same
from mom_passes.graph.values import is_pointwise, operands, value_of

TOO_FEW = "masked_scatter: the source has fewer elements than the mask has ones"
NOT_AS_MANY = "shape mismatch: the value tensor has not as many rows as the mask has ones"


@dataclass(frozen=True)
class Write:
    """A write of rows: `result` is `x` with consecutive rows of `source` where `mask` is true.

    `result` may have another shape than `x`. The first `rows` dimensions of the mask number the rows. The mask is
    constant along all others.
    """

    result: fx.Node
    x: fx.Node
    mask: fx.Node
    source: fx.Node
    rows: int


def masked_rows(gm: fx.GraphModule) -> list[fx.Node]:
    """Replace writes of rows in place. Return the new values."""
    replaced: list[fx.Node] = []
    for node in gm.graph.find_nodes(op="call_function", target=aten.where.self):
        replaced += _replace_scatter(_decomposed_scatter(node))
    for node in gm.graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        x, mask, source = operands(node)
        replaced += _replace_scatter(_scatter(node, x, mask, source))
    for node in gm.graph.find_nodes(op="call_function", target=aten.index_put.default):
        replaced += _replace_put(node)
    if replaced:
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return replaced


def _scatter(result: fx.Node, x: fx.Node, mask: fx.Node, source: fx.Node) -> Write | None:
    """Return a `masked_scatter` as a write of rows, None if its mask may differ within a row."""
    shape, shown = value_of(x).shape, value_of(mask).shape
    if len(shown) != len(shape) or value_of(x).device != value_of(mask).device:
        return None
    rows = len(shape)
    while rows and (is_one(shape[rows - 1]) or is_constant_along(mask, rows - 1)):
        rows -= 1
    if not rows or rows == len(shape) > 1 or not all_same(shown[:rows], shape[:rows]):
        return None
    return Write(result, x, mask, source, rows)


def _decomposed_scatter(node: fx.Node) -> Write | None:
    """Return the `masked_scatter` that Inductor's decomposition for GPUs ends with, None for any other `where`."""
    found = [argument(node, name) for name in ("condition", "self", "other")]
    if not all(isinstance(one, fx.Node) for one in found) or found[1].target is not aten._unsafe_masked_index.default:
        return None
    mask, gathered, x = found
    indices = argument(gathered, "indices")
    if argument(gathered, "mask") is not mask or argument(gathered, "fill") != 0 or len(indices) != 1:
        return None
    counted = _counted(indices[0])
    if counted is None or _unflattened(counted) is not _unflattened(mask):
        return None
    return _scatter(node, _unflattened(x), _unflattened(mask), argument(gathered, "self"))


def _counted(at: Any) -> fx.Node | None:
    """Return the mask whose running count minus one is an index, None for any other index."""
    if not isinstance(at, fx.Node) or at.target is not aten.sub.Tensor:
        return None
    count, one = argument(at, "self"), argument(at, "other")
    if count.target is not aten.cumsum.default or one != 1 or argument(at, "alpha") != 1:
        return None
    counted: fx.Node = argument(count, "self")
    return operands(counted)[0] if counted.target is prims.convert_element_type.default else counted


def _unflattened(node: fx.Node) -> fx.Node:
    """Return the value that was flattened to one dimension."""
    while node.target is aten.clone.default or (node.target is aten.view.default and value_of(node).dim() == 1):
        node = argument(node, "self")
    return node


def is_constant_along(mask: fx.Node, dim: int) -> bool:
    """Return whether all entries of a value along a dimension are provably equal.

    They are the same element (stride 0), or computed from values of which this holds.
    """
    value = value_of(mask)
    repeats = mask.op == "placeholder" or mask.target is aten.expand.default
    if is_one(value.shape[dim]) or (repeats and same(value.stride(dim), 0)):
        return True
    if not (is_pointwise(mask) or mask.target is aten.clone.default):
        return False
    back = value.dim() - dim
    ranks = [(one, value_of(one).dim()) for one in operands(mask)]
    return bool(ranks) and all(rank < back or is_constant_along(one, rank - back) for one, rank in ranks)


def _replace_scatter(write: Write | None) -> list[fx.Node]:
    if write is None:
        return []
    x, source = value_of(write.x), value_of(write.source)
    count = quotient(product(source.shape), product(x.shape[write.rows :]))
    if x.dtype != source.dtype or x.device != source.device or not _is_positive(count):
        return []
    graph = write.result.graph
    with graph.inserting_before(write.result):
        mask = write.mask
        for _ in range(x.dim() - write.rows):
            mask = emit(graph, aten.select.int, (mask, -1, 0))
        at = _positions(mask, count, write.result)
        rows = emit_view(write.source, [count, *x.shape[write.rows :]], write.result)
        new = _where(mask, emit(graph, aten.index.Tensor, (rows, [at])), write.x)
        _assert_count(aten.le.Scalar, mask, count, write.result, TOO_FEW)
        new = emit_view(new, value_of(write.result).shape, write.result)
    return _substitute(write.result, new)


def _replace_put(node: fx.Node) -> list[fx.Node]:
    """Replace `x[mask] = values` and `x[mask] += values`."""
    x, values = argument_node(node, "self"), argument_node(node, "values")
    mask = _only_mask(argument(node, "indices"))
    if mask is None or any(value_of(one).device != value_of(x).device for one in (mask, values)):
        return []
    shape, rank = value_of(values).shape, value_of(x).dim() - value_of(mask).dim() + 1
    is_repeated = len(shape) < rank or is_one(shape[0])
    if not is_repeated and not _is_positive(shape[0]):
        return []
    graph = node.graph
    with graph.inserting_before(node):
        if is_repeated:
            new = values if len(shape) < rank else emit(graph, aten.select.int, (values, 0, 0))
        else:
            at = _positions(mask, shape[0], node)
            new = _rows_at(values, mask, at)
            _assert_count(aten.eq.Scalar, mask, shape[0], node, NOT_AS_MANY)
        if argument(node, "accumulate"):
            new = emit(graph, aten.add.Tensor, (x, new))
        new = _where(mask, new, x)
    return _substitute(node, new)


def _only_mask(indices: Sequence[fx.Node | None]) -> fx.Node | None:
    """Return the mask of `x[mask]` or `x[mask, :]`, None for any other index."""
    first, *others = indices
    is_mask = first is not None and value_of(first).dtype is torch.bool and value_of(first).dim() > 0
    return first if is_mask and not any(others) else None


def _rows_at(values: fx.Node, mask: fx.Node, at: fx.Node) -> fx.Node:
    """Return rows of a value at positions. A pointwise function of `x[mask]` is computed from all rows of `x`."""
    graph = values.graph
    if _is_masked(values, mask):
        return argument_node(values, "self")
    if not _reads_masked(values, mask):
        return emit(graph, aten.index.Tensor, (values, [at]))
    rank, count = value_of(values).dim(), value_of(values).shape[0]

    def rows_of(operand: fx.Node) -> fx.Node:
        value = value_of(operand)
        if value.dim() < rank:
            return operand
        if same(value.shape[0], count):
            return _rows_at(operand, mask, at)
        return emit(graph, aten.select.int, (operand, 0, 0))

    args, kwargs = fx.map_arg((values.args, values.kwargs), rows_of)
    return emit(graph, values.target, args, kwargs)


def _is_masked(node: fx.Node, mask: fx.Node) -> bool:
    return node.target is aten.index.Tensor and _only_mask(argument(node, "indices")) is mask


def _reads_masked(node: fx.Node, mask: fx.Node) -> bool:
    """Return whether a value is computed by pointwise operators from `x[mask]`, and from tensors only."""
    if _is_masked(node, mask):
        return True
    if not is_pointwise(node) or len(operands(node)) != len(node.all_input_nodes):
        return False
    return any(_reads_masked(operand, mask) for operand in operands(node))


def _positions(mask: fx.Node, count: Size, before: fx.Node) -> fx.Node:
    """Return the source row of each row: the number of ones in the mask up to it, minus one, in `[0, count)`."""
    graph, rank = mask.graph, value_of(mask).dim()
    ones = emit(graph, aten.cumsum.default, (mask, rank - 1))
    if rank > 1 and not all(is_one(size) for size in value_of(mask).shape[:-1]):
        sequences = emit(graph, aten.sum.dim_IntList, (mask, [rank - 1]))
        flat = emit_view(sequences, [product(value_of(sequences).shape)], before)
        ahead = emit(graph, aten.sub.Tensor, (emit(graph, aten.cumsum.default, (flat, 0)), flat))
        ahead = emit_view(ahead, value_of(sequences).shape, before)
        ones = emit(graph, aten.add.Tensor, (ones, emit(graph, aten.unsqueeze.default, (ahead, -1))))
    last = size_node(graph, expr(count) - 1, before)
    return emit(graph, aten.clamp.default, (emit(graph, aten.sub.Tensor, (ones, 1)), 0, last))


def _assert_count(comparison: Any, mask: fx.Node, count: Size, before: fx.Node, message: str) -> None:
    """Emit an assertion on the number of ones in a mask."""
    graph = mask.graph
    ones = emit(graph, aten.sum.default, (mask,))
    holds = emit(graph, comparison, (ones, size_node(graph, count, before)))
    graph.call_function(aten._assert_async.msg, (holds, message))


def _where(mask: fx.Node, rows: fx.Node, x: fx.Node) -> fx.Node:
    for _ in range(value_of(x).dim() - value_of(mask).dim()):
        mask = emit(mask.graph, aten.unsqueeze.default, (mask, -1))
    return emit(mask.graph, aten.where.self, (mask, rows, x))


def _is_positive(count: Size | None) -> bool:
    return count is not None and not is_unknown(count) and hint(count) > 0


def _substitute(node: fx.Node, new: fx.Node) -> list[fx.Node]:
    new.meta = {**node.meta, "val": new.meta["val"]}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return [new]
