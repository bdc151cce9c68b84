"""Factories for the two large families of chunk rules.

Terms
-----
broadcast   Shapes are aligned at the last dimension. A dimension of size 1 is repeated, so it is needed whole.
origin      Of an output dimension: the index of the operand dimension it comes from, or a string, the reason why it
            cannot be split. A list with one origin per output dimension describes a view, a reduction or a softmax:

                permute(x, [1, 0, 2])    [1, 0, 2]
                sum(x, dim=1)            [0, 2]
                softmax(x, dim=-1)       [0, 1, "normalises over it"]

    rule(node, dim):  origin = origins(node)[dim.index]
                      refuse if it is a string, else need rows of dimension `origin` of the operand in the same layout
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import is_one, same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.needs import All, Carry, Dim, Final, Need, Rows
from mom_passes.rules.registry import Rule, register

Origin = int | str
Origins = Callable[[fx.Node], Sequence[Origin]]


def shape_of(node: fx.Node) -> torch.Size:
    shape: torch.Size = value_of(node).shape
    return shape


def outputs_of(node: fx.Node) -> list[Any]:
    """Return the values of a node: the items of a tuple, else a list of the one value."""
    value = meta_value(node)
    return list(value) if isinstance(value, (tuple, list)) else [value]


def output_shape(node: fx.Node) -> torch.Size:
    """Return the shape of output 0. The `dim` of a rule refers to it."""
    shape: torch.Size = outputs_of(node)[0].shape
    return shape


def checked(node: fx.Node, dim: Dim) -> Dim:
    """Return `dim`. Raise `CannotChunk` if the output has no such dimension."""
    rank = len(output_shape(node))
    if not 0 <= dim.index < rank:
        raise CannotChunk(node, dim, f"the output has {rank} dimensions")
    return dim


def broadcast_need(node: fx.Node, operand: fx.Node, shape: Sequence[Any], dim: Dim) -> Need:
    """Return the need of one operand of a broadcasting operator for rows of an output of this shape."""
    sizes = shape_of(operand)
    index = dim.index - (len(shape) - len(sizes))
    if index < 0:
        return All()
    if same(sizes[index], shape[dim.index]):
        return Rows(dim.at(index))
    if is_one(sizes[index]):
        return All()
    raise CannotChunk(node, dim, f"operand {operand.name} {list(sizes)} does not broadcast to {list(shape)}")


def pointwise_claim(node: fx.Node, dim: Dim) -> Claim:
    """Return the claim of a pointwise operator."""
    checked(node, dim)
    shape = output_shape(node)
    count = len(outputs_of(node))
    outputs = (Rows(dim),) * count if isinstance(meta_value(node), (tuple, list)) else None
    return Claim(tuple(broadcast_need(node, operand, shape, dim) for operand in operands(node)), outputs)


def recurrence_claim(node: fx.Node, dim: Dim, rows: Collection[str], tokens: int, why_not: str) -> Claim:
    """Return the claim of a call with results `(rows, state)`, which computes rows in order from the operand `state`.

    `rows` are the operands with rows along dimension `tokens`. Entries of dimension 0 of all operands are independent.
    `why_not` is the reason for other dims.
    """
    if checked(node, dim).index == 0:
        return claim(node, {name: Rows(dim) for name in (*rows, "state")}, (Rows(dim), Rows(dim)))
    if dim.index != tokens:
        raise CannotChunk(node, dim, why_not)
    if not dim.plain:
        raise CannotChunk(node, dim, "rows of a folded dimension are not consecutive tokens")
    carry = Carry(0, 1, operand="state")
    return claim(node, {name: Rows(dim) for name in rows}, (Rows(dim), Final(0)), carries=(carry,))


def origin_claim(node: fx.Node, dim: Dim, origins: Sequence[Origin]) -> Claim:
    """Return a claim for rows of every operand along the origin of `dim`, and rows of every output along `dim`."""
    checked(node, dim)
    origin = origins[dim.index]
    if isinstance(origin, str):
        raise CannotChunk(node, dim, origin)
    outputs = (Rows(dim),) * len(outputs_of(node)) if isinstance(meta_value(node), (tuple, list)) else None
    return Claim((Rows(dim.at(origin)),) * len(operands(node)), outputs)


def rule_from(origins: Origins) -> Rule:
    """Return the chunk rule of an operator from the origins of its output dimensions."""

    def rule(node: fx.Node, dim: Dim) -> Claim:
        return origin_claim(node, dim, origins(node))

    return rule


def follows(*targets: Any, **others: Any) -> Callable[[Origins], Origins]:
    """Register the function that returns the origins of an operator's output dimensions. Decorator.

    `others` are passed to `register`.
    """

    def decorate(origins: Origins) -> Origins:
        register(*targets, **others)(rule_from(origins))
        return origins

    return decorate


def all_but(rank: int, forbidden: Sequence[int], reason: str) -> list[Origin]:
    """Return origins for which every dimension comes from itself, except `forbidden` ones."""
    return [reason if index in forbidden else index for index in range(rank)]
