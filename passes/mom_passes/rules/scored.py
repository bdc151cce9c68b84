"""The chunk rule of `mom::scored`: rows are independent, and each needs all columns of the matrix."""

from __future__ import annotations

import sympy
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument
from mom_passes.graph.meta import typed_value
from mom_passes.graph.sizes import count_hint, expr, hint, product
from mom_passes.graph.values import value_of
from mom_passes.ops.scored import LIKELY, SCORED, WEIGHTED, block_bytes, dtypes_on_the_way, element_bytes
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import checked, output_shape, outputs_of
from mom_passes.rules.needs import Dim, Rows
from mom_passes.rules.registry import register


def scored_work(node: fx.Node) -> int:
    """Multiply-adds of the product of hidden states and matrix."""
    rows = count_hint(value_of(argument(node, "hidden")).shape)
    return rows * hint(value_of(argument(node, "matrix")).shape[-1])


def scored_scratch(node: fx.Node, device: str) -> sympy.Expr:
    """Bytes of one block of logits, or of all logits if these are fewer."""
    hidden, matrix = (typed_value(argument(node, name)) for name in ("hidden", "matrix"))
    wants = argument(node, "wants")
    dtypes = dtypes_on_the_way(argument(node, "steps"), hidden.dtype)
    each = element_bytes(dtypes, WEIGHTED in wants or LIKELY in wants)
    rows = expr(product(hidden.shape[:-1]))
    return sympy.Min(rows * expr(matrix.shape[-1]) * each, block_bytes(device))


@register(SCORED, recompute=False, work=scored_work, scratch=scored_scratch)
def scored(node: fx.Node, dim: Dim) -> Claim:
    if checked(node, dim).index == len(output_shape(node)) - 1:
        raise CannotChunk(node, dim, "its results combine all columns")
    return claim(node, {"hidden": Rows(dim), "targets": Rows(dim)}, (Rows(dim),) * len(outputs_of(node)))
