"""Factories for the two large families of chunk rules.

Terms
-----
broadcast   Shapes aligned at their last dimension; a dimension of size 1 is repeated, so it is needed whole.
origin      Where an output dimension comes from: the number of the operand's dimension that it is,
            or, as text, the reason why it cannot be cut. A view, a reduction, a softmax is one
            origin per output dimension:

                permute(x, [1, 0, 2])    [1, 0, 2]
                sum(x, dim=1)            [0, 2]
                softmax(x, dim=-1)       [0, 1, "normalises over it"]

    rule(node, dim):  origin = origins(node)[dim.index]
                      refuse if it is text, else need rows of the operand's dimension `origin` in the same layout
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import is_one, same
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.needs import All, Dim, Need, Rows
from mom_passes.rules.registry import Claim, Rule, register

Origin = int | str
Origins = Callable[[fx.Node], Sequence[Origin]]


def shape_of(node: fx.Node) -> torch.Size:
    return value_of(node).shape


def outputs_of(node: fx.Node) -> list[Any]:
    """The values a node returns: of a tuple its items, else the one value."""
    value = meta_value(node)
    return list(value) if isinstance(value, (tuple, list)) else [value]


def output_shape(node: fx.Node) -> torch.Size:
    """The shape of output 0, which a rule's `dim` refers to."""
    shape: torch.Size = outputs_of(node)[0].shape
    return shape


def checked(node: fx.Node, dim: Dim) -> Dim:
    """The dim itself, once the output is known to have it."""
    rank = len(output_shape(node))
    if not 0 <= dim.index < rank:
        raise CannotChunk(node, dim, f"the output has {rank} dimensions")
    return dim


def broadcast_need(node: fx.Node, operand: fx.Node, shape: Sequence[Any], dim: Dim) -> Need:
    """What a broadcasting operator needs of one operand for rows of an output of the given shape."""
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
    """The claim of every operator that computes each element by itself."""
    checked(node, dim)
    shape = output_shape(node)
    count = len(outputs_of(node))
    outputs = (Rows(dim),) * count if isinstance(meta_value(node), (tuple, list)) else None
    return Claim(tuple(broadcast_need(node, operand, shape, dim) for operand in operands(node)), outputs)


def origin_claim(node: fx.Node, dim: Dim, origins: Sequence[Origin]) -> Claim:
    """Every operand sliced where the output dimension comes from; every output alike."""
    checked(node, dim)
    origin = origins[dim.index]
    if isinstance(origin, str):
        raise CannotChunk(node, dim, origin)
    outputs = (Rows(dim),) * len(outputs_of(node)) if isinstance(meta_value(node), (tuple, list)) else None
    return Claim((Rows(dim.at(origin)),) * len(operands(node)), outputs)


def rule_from(origins: Origins) -> Rule:
    """The rule of an operator that is described by the origins of its output dimensions."""

    def rule(node: fx.Node, dim: Dim) -> Claim:
        return origin_claim(node, dim, origins(node))

    return rule


def follows(*targets: Any, **others: Any) -> Callable[[Origins], Origins]:
    """Decorator: registers a function that gives the origins of an operator's output dimensions; `others` as in
    `register`."""

    def decorate(origins: Origins) -> Origins:
        register(*targets, **others)(rule_from(origins))
        return origins

    return decorate


def all_but(rank: int, forbidden: Sequence[int], reason: str) -> list[Origin]:
    """Every dimension comes from itself, except some that cannot be cut."""
    return [reason if index in forbidden else index for index in range(rank)]
