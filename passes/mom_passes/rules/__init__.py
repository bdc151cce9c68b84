"""The table of operator facts. Importing this package fills it."""

from mom_passes.rules import attention, index, layout, matmul, pointwise, quantised, reduction, scored, source, view
from mom_passes.rules.needs import All, Dim, Need, Past, Rows, State, Window, dim_of
from mom_passes.rules.registry import (
    Alias,
    Claim,
    Described,
    OperatorFacts,
    claim_for,
    facts,
    facts_of,
    has_own_rule,
    register,
    registered,
)

__all__ = [
    "Alias", "All", "Claim", "Described", "Dim", "Need", "OperatorFacts", "Past", "Rows", "State", "Window",
    "attention", "claim_for", "dim_of", "facts", "facts_of", "has_own_rule", "index", "layout", "matmul",
    "pointwise", "quantised", "reduction", "register", "registered", "scored", "source", "view",
]  # fmt: skip
