"""The table of chunk rules. Importing this package fills it."""

from mom_passes.graph.values import operands
from mom_passes.rules import attention, index, matmul, pointwise, reduction, source, view
from mom_passes.rules.registry import (
    FULL,
    ChunkRule,
    Claim,
    Demand,
    Dim,
    Rows,
    chunk_rule_for,
    claim_for,
    register,
    registered,
)

__all__ = [
    "FULL", "ChunkRule", "Claim", "Demand", "Dim", "Rows", "attention", "chunk_rule_for", "claim_for", "index",
    "matmul", "operands", "pointwise", "reduction", "register", "registered", "source", "view",
]  # fmt: skip
