"""Chunk rules of causal convolutions, which read rows before their own, and of `mom::last_rows`, their final state."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axis, given
from mom_passes.graph.meta import typed_value
from mom_passes.graph.sizes import count_hint, expr, hint, product
from mom_passes.graph.values import value_of
from mom_passes.ops.convolution import CAUSAL_CONV1D, CONTINUED_CONV1D, LAST_ROWS, rows_ahead
from mom_passes.rules.calls import claim
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import checked, recurrence_claim
from mom_passes.rules.needs import All, Carry, Dim, Final, Rows, Window
from mom_passes.rules.registry import register, register_fold

#: The dimensions of an operand `[B, C, S]`.
BATCH, CHANNELS, TOKENS = range(3)
OF_CHANNELS = "an output channel reads several input channels"


def convolution_work(node: fx.Node) -> int:
    """Multiply-adds: rows times the elements of the kernel."""
    batch, _, rows = (hint(size) for size in value_of(argument(node, "x")).shape)
    return batch * rows * count_hint(value_of(argument(node, "weight")).shape)


def padded_bytes(node: fx.Node, device: str) -> sympy.Expr:
    """Bytes of the operand with zeros before its first row, which the kernel holds in addition to the result."""
    x, weight = (typed_value(argument(node, name)) for name in ("x", "weight"))
    rows = expr(x.shape[TOKENS]) + rows_ahead(weight, argument(node, "dilation"))
    return expr(product(x.shape[:TOKENS])) * rows * x.dtype.itemsize


@register(CAUSAL_CONV1D, recompute=False, work=convolution_work, scratch=padded_bytes)
def causal_conv1d(node: fx.Node, dim: Dim) -> Claim:
    if checked(node, dim).index == CHANNELS:
        raise CannotChunk(node, dim, OF_CHANNELS)
    if dim.index == BATCH:
        return claim(node, {"x": Rows(dim)})
    ahead = rows_ahead(value_of(argument(node, "weight")), argument(node, "dilation"))

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, weight, bias, dilation, groups = (
            given(node.target, args, kwargs, name) for name in ("x", "weight", "bias", "dilation", "groups")
        )
        return (x, weight, bias, [1], [0], [dilation], False, [0], groups), {}

    return claim(node, {"x": Rows(dim, ahead)}, edit=edit, target=aten.convolution.default)


@register(CONTINUED_CONV1D, recompute=False, work=convolution_work, scratch=padded_bytes)
def continued_conv1d(node: fx.Node, dim: Dim) -> Claim:
    return recurrence_claim(node, dim, ("x",), TOKENS, OF_CHANNELS)


@register(LAST_ROWS)
def crop(node: fx.Node, dim: Dim) -> Claim:
    """Rows along any dimension but that of the call are independent, where a pad crops features."""
    if checked(node, dim).index == axis(argument(node, "dim"), value_of(node).dim()):
        raise CannotChunk(node, dim, "keeps the last entries along it")
    return claim(node, {"before": Rows(dim), "rows": Rows(dim)})


@register_fold(LAST_ROWS)
def last_rows(node: fx.Node, dims: tuple[Dim | None, ...]) -> Claim:
    before, rows = dims
    along = axis(argument(node, "dim"), value_of(node).dim())
    if before is not None or rows is None or rows != Dim(along):
        raise CannotChunk(node, rows or before or Dim(along), "only `rows` can be split, along its own `dim`")
    return Claim((All(), Rows(rows)), (Final(0),), carries=(Carry(0, 0, operand="before"),))
