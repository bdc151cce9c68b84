"""Chunk rules of collectives. Ranks compute the same rows of the same tokens, so a collective of rows is row-wise.

    all_reduce       [B, S, H]      any dimension
    all_gather       [S, V / ranks] -> [ranks * S, V / ranks]      rows of the result have `outer=ranks`
    gather_columns   [B, S, V / ranks] -> [B, S, V]                any dimension but the last
    reduce_scatter   [ranks * S, H] -> [S, H]                      rows of the operand have `outer=ranks`

If ranks have different tokens, rows of the whole sequence are rows of all ranks, and the collective is a barrier.
"""

from __future__ import annotations

import sympy
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument
from mom_passes.graph.meta import typed_value
from mom_passes.graph.sizes import expr, product
from mom_passes.ops.collectives import ALL_GATHER, ALL_REDUCE, GATHER_COLUMNS, REDUCE_SCATTER
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import checked, output_shape, pointwise_claim
from mom_passes.rules.needs import Dim, Rows
from mom_passes.rules.registry import register

_TOKENS_APART = "its ranks have different tokens"


def _no_work(node: fx.Node) -> int:
    return 0


# Never recomputed: every rank would have to take part again.
register(ALL_REDUCE, recompute=False, work=_no_work)(pointwise_claim)


def _times(dim: Dim, ranks: int) -> Dim:
    return Dim(dim.index, dim.outer * ranks, dim.inner)


def _over(dim: Dim, ranks: int) -> Dim | None:
    """Return the dim of one rank's part along it; None if ranks have different tokens."""
    if not isinstance(dim.outer, int) or dim.outer % ranks:
        return None
    return Dim(dim.index, dim.outer // ranks, dim.inner)


def _gathered(node: fx.Node, dims: tuple[Dim | None, ...]) -> list[Dim]:
    (dim,) = dims
    if dim is None or dim.index:
        return [] if dim is None else [dim]
    return [_times(dim, argument(node, "ranks"))]


def _scattered(node: fx.Node, dims: tuple[Dim | None, ...]) -> list[Dim]:
    (dim,) = dims
    if dim is None or dim.index:
        return [] if dim is None else [dim]
    part = _over(dim, argument(node, "ranks"))
    return [] if part is None else [part]


@register(ALL_GATHER, recompute=False, work=_no_work, candidates=_gathered)
def all_gather(node: fx.Node, dim: Dim) -> Claim:
    if checked(node, dim).index:
        return Claim((Rows(dim),))
    part = _over(dim, argument(node, "ranks"))
    if part is None:
        raise CannotChunk(node, dim, _TOKENS_APART)
    return Claim((Rows(part),))


@register(REDUCE_SCATTER, recompute=False, work=_no_work, candidates=_scattered)
def reduce_scatter(node: fx.Node, dim: Dim) -> Claim:
    return Claim((Rows(dim if checked(node, dim).index else _times(dim, argument(node, "ranks"))),))


def _gathered_bytes(node: fx.Node, device: str) -> sympy.Expr:
    """The parts of all ranks exist before they are put next to each other."""
    rows = typed_value(argument(node, "rows"))
    return expr(product(rows.shape)) * argument(node, "ranks") * rows.dtype.itemsize


@register(GATHER_COLUMNS, recompute=False, work=_no_work, scratch=_gathered_bytes)
def gather_columns(node: fx.Node, dim: Dim) -> Claim:
    if checked(node, dim).index == len(output_shape(node)) - 1:
        raise CannotChunk(node, dim, "ranks have different columns")
    return Claim((Rows(dim),))
