"""Reductions over the tokens in parts: each mini-sequence reduces its own rows, and the parts are reduced once more.

Terms
-----
part       What a reduction gives for the rows of one mini-sequence; it has the shape of the result.
combine    The reduction that makes the result of the stacked parts, over their new first dimension.
total      The parts' dtype: sums and products of half precision are carried in float32 and rounded once, as PyTorch
           does inside its own kernels.

    sum(x)   = sum(parts)                  part = sum(x[rows])
    mean(x)  = sum(parts) / elements       part = sum(x[rows])
    amax(x)  = amax(parts)                 part = amax(x[rows])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import aten, has_argument
from mom_passes.graph.sizes import Size, product
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.factories import shape_of
from mom_passes.rules.needs import Dim, Rows, Window
from mom_passes.rules.reduction import reduced
from mom_passes.rules.registry import Claim

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Fold:
    """How a reduction is folded: the operator for a part, the one that combines parts, whether to divide at the end."""

    part: Any
    combine: Any
    mean: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether parts are carried in a wider dtype."""
        return self.combine in (aten.sum.dim_IntList, aten.prod.dim_int)


def _same(names: str, combine: Any) -> dict[Any, Fold]:
    return {getattr(getattr(aten, n.split(".")[0]), n.split(".")[1]): Fold(None, combine) for n in names.split()}


#: Reduction -> how it is folded (`part` None: the operator itself).
FOLDS: dict[Any, Fold] = {
    **_same("sum.default sum.dim_IntList", aten.sum.dim_IntList),
    **_same("prod.default prod.dim_int", aten.prod.dim_int),
    **_same("amax.default max.default", aten.amax.default),
    **_same("amin.default min.default", aten.amin.default),
    **_same("any.default any.dim any.dims", aten.any.dim),
    **_same("all.default all.dim all.dims", aten.all.dim),
    aten.mean.default: Fold(aten.sum.default, aten.sum.dim_IntList, mean=True),
    aten.mean.dim: Fold(aten.sum.dim_IntList, aten.sum.dim_IntList, mean=True),
}


def fold_claim(node: fx.Node, dim: Dim) -> Claim:
    """A part of the reduction, from rows of its operand along `dim`. Raises `CannotChunk` if that is not possible."""
    fold = FOLDS.get(node.target)
    if fold is None:
        raise CannotChunk(node, dim, "it is no reduction that can be computed in parts")
    if dim.index not in folded_dims(node):
        raise CannotChunk(node, dim, "it does not reduce over it")

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "dtype": total_dtype(node)} if fold.accumulates else kwargs

    return Claim((Rows(dim),), edit=edit, target=fold.part)


def folded_dims(node: fx.Node) -> list[int]:
    """The dimensions of its operand that a reduction runs over."""
    rank = len(shape_of(operands(node)[0]))
    return reduced(node, rank) if has_argument(node, "dim") else list(range(rank))


def total_dtype(node: fx.Node) -> torch.dtype:
    """The dtype in which parts are carried."""
    dtype = value_of(node).dtype
    return torch.float32 if FOLDS[node.target].accumulates and dtype in HALF else dtype


def elements(node: fx.Node) -> Size:
    """How many elements of its operand a reduction makes one of."""
    shape = shape_of(operands(node)[0])
    return product([shape[index] for index in folded_dims(node)])


def combine(node_target: Any, parts: torch.Tensor) -> torch.Tensor:
    """The result of stacked parts `[pieces, ...]`, in the parts' dtype."""
    operator = FOLDS[node_target].combine
    dims: Any = [0] if operator in (aten.sum.dim_IntList, aten.amax.default, aten.amin.default) else 0
    result: torch.Tensor = operator(parts, dims)
    return result
