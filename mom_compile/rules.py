"""Chunk rules for custom operators: what rows of a result need of each operand.

    from mom_compile.rules import All, Claim, Rows, chunk_rule

    @chunk_rule(torch.ops.mylib.scale_rows.default)      # scale_rows(x: [S, H], scale: [H])
    def scale_rows(node, dim):
        return Claim((Rows(dim), All()))                 # rows of x, all of scale

A rule raises `CannotChunk(node, dim, reason)` for a dimension along which the operator cannot be cut.
"""

from mom_passes.errors import CannotChunk
from mom_passes.rules import All, Claim, Dim, Past, Rows
from mom_passes.rules import register as chunk_rule

__all__ = ["All", "CannotChunk", "Claim", "Dim", "Past", "Rows", "chunk_rule"]
