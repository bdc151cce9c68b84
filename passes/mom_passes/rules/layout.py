"""Chunk rules of `mom::laid_out` and `mom::copy_rows`. A result is laid out where its operator runs.

If an operator computes its result whole, rows of the result would be read with the claimed strides, before they are
laid out.
"""

from __future__ import annotations

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument
from mom_passes.graph.values import operands
from mom_passes.ops.rows import COPY_ROWS, LAID_OUT
from mom_passes.rules.needs import Dim, Rows
from mom_passes.rules.registry import Alias, Claim, claim_for, register


@register(LAID_OUT, alias=Alias.COPY)
def laid_out(node: fx.Node, dim: Dim) -> Claim:
    """Rows of the operand, if its own operator computes them. Raises `CannotChunk` otherwise."""
    (operand,) = operands(node)
    claim_for(operand, dim)
    return Claim((Rows(dim),))


@register(COPY_ROWS, alias=Alias.COPY)
def copy_rows(node: fx.Node, dim: Dim) -> Claim:
    """Rows of the operand."""
    if argument(node, "room") is not None:
        raise CannotChunk(node, dim, "its result has a row that its operand has not")
    return Claim((Rows(dim),))
