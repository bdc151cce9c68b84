"""Reductions over the tokens: each mini-sequence reduces its own rows and adds them to a total that it is handed.

Terms
-----
part       What a reduction gives for the rows of one mini-sequence; it has the shape of the result.
combine    The operator that adds a part to the total so far; `identity` is the total of no rows.
total      In its own dtype: sums and products of half precision are carried in float32 and rounded once, as PyTorch
           does inside its own kernels.

    sum(x)   total = total + sum(x[rows])                     from 0
    mean(x)  total = total + sum(x[rows]), / elements at last from 0
    amax(x)  total = maximum(total, amax(x[rows]))            from -inf
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
from mom_passes.rules.reduction import HALF, reduced
from mom_passes.rules.registry import Claim


@dataclass(frozen=True)
class Fold:
    """How a reduction is folded: the operator that adds a part to the total, the one for a part (None: the reduction
    itself), and whether to divide at the end."""

    combine: Any
    part: Any = None
    mean: bool = False

    @property
    def accumulates(self) -> bool:
        """Whether the total is carried in a wider dtype."""
        return self.combine in (aten.add.Tensor, aten.mul.Tensor)


def _all(names: str, combine: Any) -> dict[Any, Fold]:
    return {getattr(getattr(aten, n.split(".")[0]), n.split(".")[1]): Fold(combine) for n in names.split()}


FOLDS: dict[Any, Fold] = {
    **_all("sum.default sum.dim_IntList", aten.add.Tensor),
    **_all("prod.default prod.dim_int", aten.mul.Tensor),
    **_all("amax.default max.default", aten.maximum.default),
    **_all("amin.default min.default", aten.minimum.default),
    **_all("any.default any.dim any.dims", aten.logical_or.default),
    **_all("all.default all.dim all.dims", aten.logical_and.default),
    aten.mean.default: Fold(aten.add.Tensor, aten.sum.default, mean=True),
    aten.mean.dim: Fold(aten.add.Tensor, aten.sum.dim_IntList, mean=True),
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


def identity(node: fx.Node) -> int | float | bool:
    """The total of no rows, which any part replaces."""
    combine, dtype = FOLDS[node.target].combine, total_dtype(node)
    if combine in (aten.add.Tensor, aten.mul.Tensor):
        return int(combine is aten.mul.Tensor)
    if combine in (aten.logical_or.default, aten.logical_and.default) or dtype == torch.bool:
        return combine in (aten.logical_and.default, aten.minimum.default)
    least = combine is aten.maximum.default
    if dtype.is_floating_point:
        return -torch.inf if least else torch.inf
    return torch.iinfo(dtype).min if least else torch.iinfo(dtype).max
