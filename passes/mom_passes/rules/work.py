"""How much an operator computes."""

from __future__ import annotations

import torch
from torch import fx

from mom_passes.graph.sizes import count_hint, hint
from mom_passes.graph.values import operands
from mom_passes.rules.registry import chunk_rule_for


def matmul_work(node: fx.Node) -> int:
    """Multiply-adds of a matmul or attention at the captured sizes; 0 for anything else."""
    rule = chunk_rule_for(node.target)
    inputs = operands(node)
    if rule is None or rule.recompute or not inputs:
        return 0
    values = [n.meta["val"] for n in inputs[:2]]
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):
        return 0
    if "attention" in str(node.target) and len(inputs) > 1:
        return count_hint(values[0].shape) * hint(values[1].shape[-2]) * 2
    out = node.meta.get("val")
    if not isinstance(out, torch.Tensor) or out.dim() < 2:
        return 0
    contracted = inputs[-2].meta["val"].shape[-1] if len(inputs) > 1 else 1
    return count_hint(out.shape) * hint(contracted)
