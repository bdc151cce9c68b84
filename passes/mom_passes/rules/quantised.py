"""Chunk rules of products with quantised weights: rows of the activations, all of the weights and their scales.

Terms
-----
packed    Weights in a layout specific to the kernel, several to a byte. A range of weight rows is no range of bytes, so
          products are not split along their columns.
scales    Scales of weights are needed whole. Activations `[M, K]` have one scale per row, `[M]`.

    gemm_4bit(A [.., K], B packed, ..) -> [.., N]                 rows of A
    int8_vectorwise_quant(A [M, K]) -> int8 [M, K], scales [M]    rows of A, rows of both results
    int8_scaled_mm(A [M, K], B [N, K], row_stats [M], ..)         rows of A and of row_stats

Operators of optional packages are registered by name, without an import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten
from mom_passes.graph.sizes import count_hint, hint
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import checked, output_shape, outputs_of, shape_of
from mom_passes.rules.needs import Dim, Rows
from mom_passes.rules.registry import Rule, register


def rows_of(name: str, *scales: str) -> Rule:
    """Return the rule of a product that needs rows of one operand and of its per-row scales."""

    def rule(node: fx.Node, dim: Dim) -> Claim:
        rank = len(output_shape(node))
        if checked(node, dim).index == rank - 1:
            raise CannotChunk(node, dim, "its columns are those of packed weights")
        if scales and rank != 2:
            raise CannotChunk(node, dim, "its scales and its rows have different dimensions")
        return claim(node, {one: Rows(dim) for one in (name, *scales)})

    return rule


def _work(name: str) -> Callable[[fx.Node], int]:
    """Return a function for the multiply-adds: result elements times the last dimension of this operand."""
    return lambda node: count_hint(output_shape(node)) * hint(shape_of(argument(node, name))[-1])


def _product(*targets: Any, rows: str, scales: tuple[str, ...] = ()) -> None:
    register(*targets, recompute=False, work=_work(rows))(rows_of(rows, *scales))


_product("bitsandbytes::gemm_4bit", "bitsandbytes::gemv_4bit", "bitsandbytes::int8_linear_matmul", rows="A")
_product("bitsandbytes::int8_scaled_mm", rows="A", scales=("row_stats",))
_product(aten._weight_int4pack_mm_for_cpu.default, aten._weight_int8pack_mm.default, rows="self")


@register("bitsandbytes::int8_mm_dequant")
def dequantised(node: fx.Node, dim: Dim) -> Claim:
    """Multiplies each element with the scales of its row and its column."""
    by = ("row_stats", "col_stats")[checked(node, dim).index]
    if len(output_shape(node)) != 2:
        raise CannotChunk(node, dim, "its scales and its rows have different dimensions")
    columns = {"bias": Rows(dim.at(0))} if by == "col_stats" else {}
    return claim(node, {"A": Rows(dim), by: Rows(dim.at(0)), **columns})


@register("bitsandbytes::int8_vectorwise_quant")
def quantised(node: fx.Node, dim: Dim) -> Claim:
    """Computes one scale per row. With a threshold, it zeroes every column in which any row has an outlier."""
    if argument(node, "threshold") != 0.0:
        raise CannotChunk(node, dim, "looks for outliers in all rows")
    if len(output_shape(node)) != 2 or checked(node, dim).index != 0:
        raise CannotChunk(node, dim, "has one scale for all its rows")
    return claim(node, {"A": Rows(dim)}, tuple(None if one is None else Rows(dim) for one in outputs_of(node)))
