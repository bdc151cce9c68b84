"""Fold rules of reductions over tokens: each mini-sequence reduces its rows, and a total combines the parts.

    sum(x)   total = total + sum(x[rows])                        from 0
    mean(x)  total = total + sum(x[rows]); total / elements      from 0
    amax(x)  total = maximum(total, amax(x[rows]))               from -inf

Totals of half-precision sums and products are float32 and rounded once, as in PyTorch's kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import aten, has_argument, overloads
from mom_passes.graph.edit import emit, size_node
from mom_passes.graph.sizes import product
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import shape_of
from mom_passes.rules.needs import Dim, Fold, Number, Rows, Window
from mom_passes.rules.reduction import HALF, reduced
from mom_passes.rules.registry import register_fold

#: Reduction -> the operator that combines a part with the total.
COMBINE: dict[Any, Any] = {
    **dict.fromkeys(overloads(aten, "sum.default sum.dim_IntList mean.default mean.dim"), aten.add.Tensor),
    **dict.fromkeys(overloads(aten, "prod.default prod.dim_int"), aten.mul.Tensor),
    **dict.fromkeys(overloads(aten, "amax.default max.default"), aten.maximum.default),
    **dict.fromkeys(overloads(aten, "amin.default min.default"), aten.minimum.default),
    **dict.fromkeys(overloads(aten, "any.default any.dim any.dims"), aten.logical_or.default),
    **dict.fromkeys(overloads(aten, "all.default all.dim all.dims"), aten.logical_and.default),
}
#: Mean -> the operator that computes a part: a sum.
PARTS: dict[Any, Any] = {aten.mean.default: aten.sum.default, aten.mean.dim: aten.sum.dim_IntList}


@register_fold(*COMBINE)
def reduction(node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
    (dim,) = dims
    if dim is None or dim.index not in folded_dims(node):
        raise CannotChunk(node, dim or Dim(0), "does not reduce over it")
    combine, dtype = COMBINE[node.target], value_of(node).dtype
    accumulates = combine in (aten.add.Tensor, aten.mul.Tensor)
    total = torch.float32 if accumulates and dtype in HALF else dtype

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "dtype": total} if accumulates else kwargs

    def divide(total: fx.Node) -> fx.Node:
        shape = shape_of(operands(node)[0])
        elements = product([shape[index] for index in folded_dims(node)])
        return emit(total.graph, aten.div.Tensor, (total, size_node(total.graph, elements)))

    part = PARTS.get(node.target)
    fold = Fold(combine, identity(combine, total), total, None if part is None else divide)
    return Claim((Rows(dim),), (fold,), edit, part)


def folded_dims(node: fx.Node) -> list[int]:
    """Return the operand dimensions that a reduction reduces over."""
    rank = len(shape_of(operands(node)[0]))
    return reduced(node, rank) if has_argument(node, "dim") else list(range(rank))


def identity(combine: Any, dtype: torch.dtype) -> Number:
    """Return the identity element of `combine`: the total of no rows."""
    if combine in (aten.add.Tensor, aten.mul.Tensor):
        return int(combine is aten.mul.Tensor)
    if combine in (aten.logical_or.default, aten.logical_and.default) or dtype == torch.bool:
        return combine in (aten.logical_and.default, aten.minimum.default)
    least = combine is aten.maximum.default
    if dtype.is_floating_point:
        return -torch.inf if least else torch.inf
    return torch.iinfo(dtype).min if least else torch.iinfo(dtype).max
