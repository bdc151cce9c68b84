"""Multiply-adds of operators."""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.meta import meta_value
from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import operands, value_of
from mom_passes.rules.registry import facts


def matmul_work(node: fx.Node) -> int:
    """Return the multiply-adds of a matrix product or attention at the captured sizes, 0 for most other operators.

    Scans and sorts, which are not recomputed either, count like a product, so that they rank as work.
    """
    known, inputs = facts(node), operands(node)
    if known.recompute or not inputs:
        return 0
    if known.work is not None:
        return known.work(node)
    values = [meta_value(n) for n in inputs[:2]]
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):
        return 0
    return _product_work(node)


def products(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the matrix products and attentions of a graph with their multiply-adds.

    Scans and sorts have one operand and are left out, although `matmul_work` is positive for them.
    """
    return {node: work for node in graph.nodes if len(operands(node)) > 1 and (work := matmul_work(node))}


def _product_work(node: fx.Node) -> int:
    """Return result elements times the contracted dimension."""
    out, inputs = meta_value(node), operands(node)
    if not isinstance(out, torch.Tensor) or out.dim() < 2:
        return 0
    contracted = value_of(inputs[-2]).shape[-1] if len(inputs) > 1 else 1
    return count_hint(out.shape) * hint(contracted)
