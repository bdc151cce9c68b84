"""Chunk rules for operators of your own: what rows of a result need of each operand.

    from mom_compile.rules import All, Claim, Rows, chunk_rule

    @chunk_rule(torch.ops.mylib.scale_rows.default)      # scale_rows(x: [S, H], scale: [H])
    def scale_rows(node, dim):
        return Claim((Rows(dim), All()))                 # rows of x, all of scale

A rule raises `CannotChunk(node, dim, reason)` for a dimension along which the operator cannot be cut.
"""

from mom_passes.errors import CannotChunk
from mom_passes.rules import All, Carry, Claim, Dim, Final, Fold, Last, Rows, Window
from mom_passes.rules import register as chunk_rule
from mom_passes.rules import register_fold as fold_rule

__all__ = [
    "All", "CannotChunk", "Carry", "Claim", "Dim", "Final", "Fold", "Last", "Rows", "Window", "chunk_rule", "fold_rule"
]  # fmt: skip
