"""Chunk rules and other operator facts. Importing this package fills the table."""

from mom_passes.rules import (
    attention,
    collectives,
    convolution,
    folds,
    index,
    layout,
    matmul,
    pointwise,
    quantised,
    reduction,
    scans,
    scored,
    source,
    view,
)
from mom_passes.rules.claim import Claim
from mom_passes.rules.needs import All, Carry, Dim, Final, Fold, Last, Need, Output, Rows, Window, dim_of
from mom_passes.rules.registry import (
    Alias,
    Described,
    OperatorFacts,
    claim_for,
    facts,
    facts_of,
    fold_for,
    has_own_rule,
    register,
    register_fold,
    registered,
)

__all__ = [
    "Alias", "All", "Carry", "Claim", "Described", "Dim", "Final", "Fold", "Last", "Need", "OperatorFacts",
    "Output", "Rows", "Window", "attention", "claim_for", "collectives", "convolution", "dim_of", "facts", "facts_of",
    "fold_for", "folds", "has_own_rule", "index", "layout", "matmul", "pointwise", "quantised", "reduction",
    "register", "register_fold", "registered", "scans", "scored", "source", "view",
]  # fmt: skip
