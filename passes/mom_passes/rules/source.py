"""Chunk rules of constants, ranges and triangles, whose values depend on sizes.

A body creates its own rows only. The sequence length in the arguments becomes the number of rows, and values that
depend on the position are offset by the body's first row:

    full([B, S], 0)              ->  full([B, window.count], 0)
    iota(S, start=a, step=k)     ->  iota(window.count, start=a + window.start * k, step=k)
    tril(x, d)  along its rows   ->  tril(x[rows], d + window.start)
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mom_passes.errors import CannotChunk
from mom_passes.graph.arguments import argument, aten, axis, given, has_argument, overloads, prims, replace
from mom_passes.graph.sizes import expr
from mom_passes.graph.values import operands
from mom_passes.rules.arithmetic import add, mul
from mom_passes.rules.claim import Claim
from mom_passes.rules.factories import checked, output_shape, pointwise_claim
from mom_passes.rules.needs import All, Dim, Rows, Window
from mom_passes.rules.registry import register


def tokens(node: fx.Node, dim: Dim, window: Window) -> Any:
    """Return the size of a token dimension inside a body."""
    return mul(mul(_integer(node, dim, dim.outer), window.count), _integer(node, dim, dim.inner))


def require_static_layout(node: fx.Node, dim: Dim) -> None:
    """Raise `CannotChunk` if `tokens` could not be computed for this layout. For rules, since an edit cannot refuse."""
    _integer(node, dim, dim.outer)
    _integer(node, dim, dim.inner)


def _integer(node: fx.Node, dim: Dim, size: Any) -> int:
    known = expr(size)
    if not known.is_Integer:
        raise CannotChunk(node, dim, f"the size of a body's rows depends on the symbolic layout factor {known}")
    return int(known)


@register(
    *overloads(aten, "full zeros ones empty.memory_format new_full new_zeros new_ones new_empty"),
    size_arguments=("size",),
)
def sized(node: fx.Node, dim: Dim) -> Claim:
    """All rows are equal, so only the size changes. The operand of `new_full` determines dtype and device only."""
    checked(node, dim)
    require_static_layout(node, dim)

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        size = list(argument(node, "size"))
        size[dim.index] = tokens(node, dim, window)
        return replace(node.target, args, kwargs, size=size)

    return Claim((All(),) * len(operands(node)), edit=edit)


register(*overloads(aten, "full_like zeros_like ones_like empty_like"))(pointwise_claim)


def require_plain(node: fx.Node, dim: Dim) -> None:
    if not dim.plain:
        raise CannotChunk(node, dim, "rows of a folded dimension are not one range of positions")


@register(prims.iota.default, size_arguments=("length",))
def iota(node: fx.Node, dim: Dim) -> Claim:
    require_plain(node, checked(node, dim))

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first, step = (given(node.target, args, kwargs, name) for name in ("start", "step"))
        start = add(first, mul(window.start, step))
        return replace(node.target, args, kwargs, length=window.count, start=start)

    return Claim((), edit=edit)


@register(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(node: fx.Node, dim: Dim) -> Claim:
    require_plain(node, checked(node, dim))
    names = [name for name in ("start", "end", "step") if has_argument(node, name)]
    if any(isinstance(argument(node, name), float) for name in names):
        raise CannotChunk(node, dim, "a range of floating-point numbers may round to another length")

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first = given(node.target, args, kwargs, "start") if "start" in names else 0
        step = given(node.target, args, kwargs, "step") if "step" in names else 1
        start = add(first, mul(window.start, step))
        return (start, add(start, mul(window.count, step)), step), kwargs

    return Claim((), edit=edit, target=aten.arange.start_step)


@register(aten.tril.default, aten.triu.default)
def triangle(node: fx.Node, dim: Dim) -> Claim:
    """Row r is cut off at column `r + diagonal`, so the diagonal moves by the row offset."""
    rank = len(output_shape(node))
    checked(node, dim)
    if dim.index < rank - 2:
        return Claim((Rows(dim),))
    require_plain(node, dim)
    sign = 1 if dim.index == axis(-2, rank) else -1

    def edit(args: tuple[Any, ...], kwargs: dict[str, Any], window: Window) -> tuple[tuple[Any, ...], dict[str, Any]]:
        diagonal = add(given(node.target, args, kwargs, "diagonal"), mul(window.start, sign))
        return replace(node.target, args, kwargs, diagonal=diagonal)

    return Claim((Rows(dim),), edit=edit)
