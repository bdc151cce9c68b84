"""Properties of integer vectors that follow from the operators that compute them: ranges, constants, upper bounds."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mom_passes.graph.arguments import argument, aten, axis, prims
from mom_passes.graph.sizes import Size, expr, same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules import facts
from mom_passes.rules.source import sized

CASTS = (aten._to_copy.default, prims.convert_element_type.default, aten.clone.default)
#: Dtypes that hold the number of any expert.
KEY_DTYPES = (torch.int16, torch.int32, torch.int64, torch.float32, torch.float64)

#: Operators that return indices along `dim`, and the number of the output with the indices.
_INDICES = {aten.topk.default: 1, aten.sort.default: 1, aten.sort.stable: 1, aten.max.dim: 1, aten.min.dim: 1}
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default,
          aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int,
          aten.expand.default)  # fmt: skip


def is_constant(node: Any) -> bool:
    """Whether a node fills a tensor with one value and has no operands."""
    return isinstance(node, fx.Node) and not operands(node) and facts(node).rule is sized


def _filled_with(node: fx.Node) -> Any:
    """Return the number that a constant is filled with; None if it is unknown."""
    if node.target is aten.scalar_tensor.default:
        return argument(node, "s")
    return argument(node, "fill_value") if node.target is aten.full.default else None


def is_range(node: fx.Node, length: Size) -> bool:
    """Whether a node is the vector 0, 1, .., `length - 1`."""
    value = value_of(node)
    if value.dim() != 1 or not same(value.shape[0], length):
        return False
    if node.target is prims.iota.default:
        return (argument(node, "start"), argument(node, "step")) == (0, 1)
    return node.target is aten.arange.default or (
        node.target in (aten.arange.start, aten.arange.start_step)
        and argument(node, "start") == 0
        and (node.target is aten.arange.start or argument(node, "step") == 1)
    )


def uncast(node: fx.Node) -> fx.Node:
    """Return the value under casts that keep the numbers of experts."""
    while node.target in CASTS and (node.target is aten.clone.default or value_of(node).dtype in KEY_DTYPES):
        node = operands(node)[0]
    return node


def upper_bound(node: fx.Node) -> int | None:
    """Return a number that all elements are below, if none is negative, else None. Elements are indices, constants, one
    of two by a condition, or remainders of any of these: the experts of this rank, and one number for all others."""
    while node.target in VIEWS or (node.target in CASTS and value_of(node).dtype in KEY_DTYPES):
        node = operands(node)[0]
    if node.target is aten.cat.default or node.target is aten.where.self:
        bounds = [upper_bound(part) for part in operands(node)[-2 if node.target is aten.where.self else 0 :]]
        return None if None in bounds else max(filter(None, bounds))
    if node.target is aten.remainder.Scalar:
        divisor, bound = argument(node, "other"), upper_bound(operands(node)[0])
        return None if bound is None or not isinstance(divisor, int) or divisor < 1 else min(bound, divisor)
    filled = _filled_with(node)
    if filled is not None:
        return filled + 1 if isinstance(filled, int) and filled >= 0 else None
    source, item = node.args if node.target is operator.getitem else (node, 0)
    if not isinstance(source, fx.Node) or (source.target in _INDICES and item != _INDICES[source.target]):
        return None
    if source.target not in _INDICES and source.target is not aten.argmax.default:
        return None
    (operand,) = operands(source)
    dim, rank = argument(source, "dim"), value_of(operand).dim()
    if dim is None:
        return None
    size = expr(value_of(operand).shape[axis(dim, rank)])
    return int(size) if size.is_Integer else None
