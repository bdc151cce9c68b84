"""Which values attentions read as keys and values. An analysis of the captured graph, before loops.

Terms
-----
attention   `mom.attention`, FlexAttention, SDPA, or two batched products: queries by keys, and the exponentials of the
            result by values.
itself      An attention reads the value itself, through views, copies and casts; otherwise it reads rows computed from
            the value's rows (latents, which a product expands to keys and values).

    for each attention, in order:
        from its keys and values, along their tokens, back through the claims of the chunk rules:
            record every value whose rows these are computed from, with its token dimension and the attention
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from mom_passes.attention.flex import FlexAttention
from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, axis
from mom_passes.graph.values import input_node, operand_chain, operands, rank_of
from mom_passes.ops.attention import MOM_ATTENTION
from mom_passes.ops.transfers import FETCH
from mom_passes.rules import Alias, Dim, Rows, claim_for, facts
from mom_passes.rules.work import matmul_work

aten = torch.ops.aten
prims = torch.ops.prims

PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default, aten.matmul.default})

#: Operators that keep elements, and operators that keep rows.
_SAME_ELEMENTS = (Alias.VIEW, Alias.COPY)
_SAME_ROWS = (*_SAME_ELEMENTS, Alias.CAST)


@dataclass(frozen=True)
class Attention:
    """An attention's keys and values with their token dimensions; `layer` is the first node of its layer."""

    node: fx.Node
    read: tuple[tuple[fx.Node, int], ...]
    layer: fx.Node


@dataclass(frozen=True)
class Read:
    """The token dimension of a value whose rows an attention reads, and the first layer that does."""

    dim: Dim
    layer: fx.Node
    itself: bool


def attentions(gm: fx.GraphModule) -> list[Attention]:
    """All attentions of a graph, in order."""
    found = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is MOM_ATTENTION:
            found.append(_fused(node, argument(node, "key"), argument(node, "value")))
        elif isinstance(node.target, FlexAttention) or "scaled_dot_product" in str(node.target):
            found.append(_fused(node, *node.args[1:3]))
        else:
            found += _as_products(node)
    return found


def _fused(node: fx.Node, key: fx.Node, value: fx.Node) -> Attention:
    return Attention(node, ((key, rank_of(key) - 2), (value, rank_of(value) - 2)), node)


@dataclass(frozen=True)
class _Product:
    """A product of two batches of matrices. `node` reads the second and sums over its dimension `summed`."""

    first: fx.Node
    second: fx.Node
    summed: int
    node: fx.Node


def _product(node: fx.Node) -> _Product | None:
    """The batched product that a node computes, also where Inductor has decomposed it to a sum of products."""
    if node.target in PRODUCTS:
        first, second = node.args[-2:]
        assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
        return _Product(first, second, rank_of(second) - 2, node)
    if node.target is not aten.sum.dim_IntList or not isinstance(node.args[0], fx.Node):
        return None
    multiplied, dims = node.args[0], argument(node, "dim")
    if multiplied.target is not aten.mul.Tensor or len(dims) != 1:
        return None
    first, second = multiplied.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node) and rank_of(second) > 3):
        return None
    return _Product(first, second, axis(dims[0], rank_of(second)), multiplied)


def _as_products(values: fx.Node) -> list[Attention]:
    """Both products of an attention, if a node is the second of them."""
    weighted = _product(values)
    scores = _scores_of(weighted.first) if weighted is not None else None
    if weighted is None or scores is None:
        return []
    keys = Attention(scores.node, ((scores.second, rank_of(scores.second) - 1),), scores.node)
    return [keys, Attention(weighted.node, ((weighted.second, weighted.summed),), scores.node)]


def _scores_of(weights: fx.Node) -> _Product | None:
    """The product from whose exponentials some weights are computed, or None."""
    pending = [(weights, False)]
    seen = set(pending)
    while pending:
        node, exponential = pending.pop()
        if node.op != "call_function":
            continue
        product = _product(node) if exponential else None
        if product is not None:
            return product
        if matmul_work(node):
            continue
        exponential = exponential or node.target is aten.exp.default or "softmax" in str(node.target)
        following = {(operand, exponential) for operand in node.all_input_nodes} - seen
        seen |= following
        pending += following
    return None


def attention_reads(gm: fx.GraphModule) -> dict[fx.Node, Read]:
    """Every value from whose rows the keys or values of an attention are computed."""
    reads: dict[fx.Node, Read] = {}
    for attention in attentions(gm):
        for operand, index in attention.read:
            _follow(operand, Read(Dim(index), attention.layer, itself=True), reads)
    return reads


def _follow(operand: fx.Node, read: Read, reads: dict[fx.Node, Read]) -> None:
    pending = [(operand, read)]
    while pending:
        node, found = pending.pop()
        known = reads.get(node)
        if known is not None and (known.itself or not found.itself):
            continue
        reads[node] = found
        itself = found.itself and (facts(node).alias in _SAME_ROWS or _takes_rows(node, found.dim))
        pending += [(source, Read(dim, found.layer, itself)) for source, dim in rows_from(node, found.dim)]


def _takes_rows(node: fx.Node, dim: Dim) -> bool:
    """Whether a node is a slice along the tokens."""
    if node.target is not aten.slice.Tensor or not dim.plain:
        return False
    return axis(argument(node, "dim"), rank_of(node)) == dim.index


def rows_from(node: fx.Node, dim: Dim) -> Iterator[tuple[fx.Node, Dim]]:
    """The operands whose rows the rows of a value are computed from, with their token dimensions."""
    if node.op != "call_function" or node.target is FETCH:
        return
    if _takes_rows(node, dim):
        yield argument(node, "self"), dim
        return
    try:
        claim = claim_for(node, dim)
    except CannotChunk:
        return
    for operand, need in zip(operands(node), claim.needs, strict=True):
        if isinstance(need, Rows):
            yield operand, need.dim


def read_of(node: fx.Node, reads: dict[fx.Node, Read]) -> Read | None:
    """How a value is read, also if it is a view, a copy or a slice of a value that is read."""
    chain = [node]
    while chain[-1] not in reads:
        last = chain[-1]
        if facts(last).alias not in _SAME_ROWS and last.target is not aten.slice.Tensor:
            return None
        chain.append(input_node(last))
    found = reads[chain[-1]]
    if len(chain) == 1 or not found.itself:
        return found if len(chain) == 1 else None
    for index in range(rank_of(node)):
        dim: Dim | None = Dim(index)
        for above, below in itertools.pairwise(chain):
            dim = dict(rows_from(above, dim)).get(below) if dim is not None else None
        if dim == found.dim:
            return Read(Dim(index), found.layer, itself=True)
    return None


def source_chain(node: fx.Node) -> list[fx.Node]:
    """A node and, through views and copies, its sources."""
    return operand_chain(node, lambda value: facts(value).alias in _SAME_ELEMENTS)


def source_of(node: fx.Node) -> fx.Node:
    """The source of a node through any number of views and copies."""
    return source_chain(node)[-1]
