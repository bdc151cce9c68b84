"""Chunk rules of gather, scatter and index operators, and of tuple items.

Terms
-----
source    The operand that is indexed. An index may point to any entry of the indexed dimension, so the source is needed
          whole for rows of the index. Along its other dimensions it is sliced like the output.
indexed   Dimensions of the source that `x[i, :, j]` replaces by the broadcast shape of the index tensors. That shape
          takes the place of the indexed dimensions in the result, or comes first if they are not adjacent.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axis
from mom_passes.graph.sizes import same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import (
    Origin,
    all_but,
    broadcast_need,
    checked,
    follows,
    output_shape,
    outputs_of,
    shape_of,
)
from mom_passes.rules.needs import All, Dim, Rows
from mom_passes.rules.registry import claim_for, register


# Cheap, but not repeated: with the look-up repeated after the first barrier, the first layer's loop would differ from
# those of the other layers and need a compilation of its own. The next loop keeps these rows in any case.
@register(aten.embedding.default, recompute=False)
def embedding(node: fx.Node, dim: Dim) -> Claim:
    rank = len(shape_of(argument(node, "indices")))
    if checked(node, dim).index < rank:
        return claim(node, {"indices": Rows(dim), "weight": All()})
    return claim(node, {"indices": All(), "weight": Rows(dim.at(1))})


@register(aten.gather.default)
def gather(node: fx.Node, dim: Dim) -> Claim:
    source, index = argument(node, "self"), argument(node, "index")
    if checked(node, dim).index == axis(argument(node, "dim"), len(shape_of(index))):
        return claim(node, {"self": All(), "index": Rows(dim)})
    if not same(shape_of(source)[dim.index], shape_of(index)[dim.index]):
        raise CannotChunk(node, dim, "source and index have different lengths along it")
    return claim(node, {"self": Rows(dim), "index": Rows(dim)})


@register(aten.index_select.default)
def index_select(node: fx.Node, dim: Dim) -> Claim:
    rank = len(shape_of(argument(node, "self")))
    if checked(node, dim).index == axis(argument(node, "dim"), rank):
        return claim(node, {"self": All(), "index": Rows(dim.at(0))})
    return claim(node, {"self": Rows(dim), "index": All()})


@register(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(node: fx.Node, dim: Dim) -> Claim:
    checked(node, dim)
    source = argument(node, "self")
    indices: list[Any] = list(argument(node, "indices"))
    tensors = [one for one in indices if one is not None]
    if any(value_of(one).dtype in (torch.bool, torch.uint8) for one in tensors):
        raise CannotChunk(node, dim, "a boolean index selects a number of elements known only at run time")
    indexed = [position for position, one in enumerate(indices) if one is not None]
    rank = len(output_shape(node)) - (len(shape_of(source)) - len(indexed))
    adjacent = indexed == list(range(indexed[0], indexed[0] + len(indexed)))
    first = indexed[0] if adjacent else 0
    if first <= dim.index < first + rank:
        shape = output_shape(node)[first : first + rank]
        within = dim.at(dim.index - first)
        return Claim((All(), *(broadcast_need(node, one, shape, within) for one in tensors)))
    kept = [position for position in range(len(shape_of(source))) if position not in indexed]
    origin = kept[dim.index if dim.index < first else dim.index - rank]
    return Claim((Rows(dim.at(origin)), *(All() for _ in tensors)))


@register(aten.isin.Tensor_Tensor, aten.bucketize.Tensor)
def among(node: fx.Node, dim: Dim) -> Claim:
    """Compares each element with all elements of the other operand."""
    checked(node, dim)
    return Claim((Rows(dim), All()))


@register(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def scatter(node: fx.Node, dim: Dim) -> Claim:
    """Writes move elements along `dim` only; every other dimension can be split."""
    index, rank = argument(node, "index"), len(output_shape(node))
    if checked(node, dim).index == axis(argument(node, "dim"), rank):
        raise CannotChunk(node, dim, "writes anywhere along it")
    if any(not same(shape_of(one)[dim.index], output_shape(node)[dim.index]) for one in operands(node)):
        raise CannotChunk(node, dim, f"the index {list(shape_of(index))} does not cover it")
    return Claim((Rows(dim),) * len(operands(node)))


@follows(aten.slice_scatter.default)
def slice_scatter(node: fx.Node) -> list[Origin]:
    rank = len(output_shape(node))
    return all_but(rank, [axis(argument(node, "dim"), rank)], "writes a range of it")


@register(aten.select_scatter.default)
def select_scatter(node: fx.Node, dim: Dim) -> Claim:
    at = axis(argument(node, "dim"), len(output_shape(node)))
    if checked(node, dim).index == at:
        raise CannotChunk(node, dim, "writes one position of it")
    return claim(node, {"self": Rows(dim), "src": Rows(dim.at(dim.index - (dim.index > at)))})


@register(operator.getitem)
def getitem(node: fx.Node, dim: Dim) -> Claim:
    """One item of a tuple: find the dim of output 0 for which the producer's claim gives this item rows along `dim`."""
    producer, item = node.args
    assert isinstance(producer, fx.Node)
    assert isinstance(item, int)
    checked(node, dim)
    first = outputs_of(producer)[0]
    if not isinstance(first, torch.Tensor):
        raise CannotChunk(node, dim, f"{producer.target} ({producer.name}) returns no tensor as output 0")
    refusals = []
    for index in _nearest(dim.index, first.dim()):
        try:
            outputs = claim_for(producer, dim.at(index), in_order=True).outputs
        except CannotChunk as refusal:
            refusals.append(refusal.reason)
            continue
        if outputs is not None and outputs[item] == Rows(dim):
            return Claim((Rows(dim.at(index)),))
    reasons = "; ".join(dict.fromkeys(refusals)) or "its rows do not appear in this output"
    raise CannotChunk(node, dim, f"{producer.target} ({producer.name}): {reasons}")


def _nearest(index: int, rank: int) -> list[int]:
    """Return all dimensions by distance from `index`, which nearly always is the right one."""
    return sorted(range(rank), key=lambda other: abs(other - index))
