"""Chunk rules of `mom::laid_out` and `mom::copy_rows`.

`mom::laid_out` must run where its operand is computed. If the operand were computed on the full sequence, a loop would
read rows of it with the strides claimed for the result, before the operator makes them true.
"""

from __future__ import annotations

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument
from mom_passes.graph.values import operands
from mom_passes.ops.rows import COPY_ROWS, LAID_OUT
from mom_passes.rules.claim import Claim
from mom_passes.rules.needs import Dim, Rows
from mom_passes.rules.registry import Alias, claim_for, register


@register(LAID_OUT, alias=Alias.COPY)
def laid_out(node: fx.Node, dim: Dim) -> Claim:
    """Rows of the operand, if the operand's own operator can compute them."""
    (operand,) = operands(node)
    claim_for(operand, dim)
    return Claim((Rows(dim),))


@register(COPY_ROWS, alias=Alias.COPY)
def copy_rows(node: fx.Node, dim: Dim) -> Claim:
    """Rows of the operand, if the copy reserves no further row."""
    if argument(node, "room") is not None:
        raise CannotChunk(node, dim, "its result has more rows than its operand")
    return Claim((Rows(dim),))
